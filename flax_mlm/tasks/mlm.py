"""Held-out loss and accuracy, with fixed masks and standard errors, beside two context-free baselines."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_mlm import sharding
from flax_mlm.data.corpus import Corpus
from flax_mlm.data.pipeline import eval_batches
from flax_mlm.preemption import Stopped
from flax_mlm.step import Answers
from flax_mlm.trained import Trained


class Measured(NamedTuple):
    """Sums over predicted tokens, float64. The four sums are: how many, loss (nats), loss squared, correct ones."""

    row_R4: np.ndarray  # for each row
    token_V4: np.ndarray  # for each piece that was to be predicted
    position_L4: np.ndarray  # for each position in a segment
    counts_V: np.ndarray  # int64, how often each piece is in the rows; 0 for special ones


def run(trained: Trained, corpus: Corpus, poll: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Evaluates on the held-out rows, each once. Masks follow from the seed and the row's number, so that every
    call, on any number of devices, predicts the same tokens.

    Args:
      trained: The model.
      corpus: Its validation split is used.
      poll: Called before every batch; says whether this process wants to stop.

    Raises:
      Stopped: one of the processes wants to.

    Returns:
      loss (nats per predicted token) and accuracy with their standard errors over rows, perplexity,
      bits_per_byte (tokens of the held-out text × loss / its bytes), rows, predicted_tokens; and of the same
      rows' tokens unigram_entropy (nats) and majority_accuracy (always saying the most frequent token).
    """
    return summary(measure(trained, corpus, poll), corpus)


def measure(trained: Trained, corpus: Corpus, poll: Callable[[], bool]) -> Measured:
    """As `run`, with the sums that its numbers, and those of `breakdown`, follow from."""
    is_special_V = np.asarray(trained.vocab.is_special)
    counts_V, token_V4 = np.zeros(len(is_special_V), np.int64), np.zeros((len(is_special_V), 4))
    position_L4, row_R4 = np.zeros((corpus.seq_len, 4)), []
    for tokens, found in answers(trained, corpus, poll):
        counts_V += np.bincount(tokens.ravel(), minlength=len(counts_V))
        loss_BK = np.asarray(found.scored.loss_BK, np.float64)
        sums_BK4 = np.stack([found.weights_BK, loss_BK, loss_BK**2, found.scored.correct_BK], axis=-1)
        row_R4.append(sums_BK4.sum(1))
        used = found.weights_BK > 0
        np.add.at(token_V4, found.labels_BK[used], sums_BK4[used])
        np.add.at(position_L4, found.positions_BK[used], sums_BK4[used])
    if jax.process_count() > 1:  # each has seen its own rows
        counts_V = np.asarray(multihost_utils.process_allgather(counts_V)).sum(0)
    return Measured(np.concatenate(row_R4), token_V4, position_L4, np.where(is_special_V, 0, counts_V))


def answers(trained: Trained, corpus: Corpus, poll: Callable[[], bool]) -> Iterator[tuple[np.ndarray, Answers]]:
    """For every batch of the held-out rows the tokens of this process, and what the model says of all rows."""
    config = trained.config
    for batch in eval_batches(
        corpus.split("validation"),
        batch_size=config.eval.batch_size,
        max_rows=config.eval.max_rows,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ):
        del batch["valid"]  # rows that fill up the last batch are all padding and have nothing to predict
        global_batch = sharding.global_batch(batch, trained.mesh, stop=poll())
        found, stop = jax.device_get(trained.steps.evaluate(trained.params, global_batch, trained.vocab))
        if stop:
            raise Stopped
        yield batch["tokens"], found


def summary(measured: Measured, corpus: Corpus) -> dict[str, float]:
    """What `run` returns."""
    count_R, loss_R, _, correct_R = measured.row_R4.T
    counts_V, total = measured.counts_V, count_R.sum()
    loss, accuracy = loss_R.sum() / total, correct_R.sum() / total
    frequency_V = counts_V[counts_V > 0] / counts_V.sum()
    held_out = corpus.counts["validation"]
    return {
        "loss": loss,
        "loss_stderr": math.sqrt(np.square(loss_R - loss * count_R).sum()) / total,
        "accuracy": accuracy,
        "accuracy_stderr": math.sqrt(np.square(correct_R - accuracy * count_R).sum()) / total,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) * held_out["tokens"] / held_out["bytes"],
        "unigram_entropy": float(-(frequency_V * np.log(frequency_V)).sum()),
        "majority_accuracy": float(frequency_V.max()),
        "rows": int((count_R > 0).sum()),
        "predicted_tokens": int(total),
    }


def breakdown(measured: Measured, starts_word_V: np.ndarray) -> dict[str, dict[str, dict[str, float]]]:
    """Loss and accuracy by the frequency of the predicted piece (its rank in the held-out rows), by whether it starts
    a word, and by its position in the segment.

    Args:
      starts_word_V: bool, for each piece.

    Returns:
      kind -> group -> predicted_tokens, loss, loss_stderr (over tokens) and accuracy; groups without tokens are left
      out.
    """
    ranked, starts_V = np.argsort(-measured.counts_V, kind="stable")[: (measured.counts_V > 0).sum()], starts_word_V
    groups: dict[str, dict[str, np.ndarray]] = {"frequency": {}, "word": {}, "position": {}}
    for low, high in ((0, 100), (100, 1000), (1000, 10_000), (10_000, len(starts_V))):
        groups["frequency"][f"rank {low + 1:,} to {high:,}"] = measured.token_V4[ranked[low:high]]
    groups["word"] = {"starts a word": measured.token_V4[starts_V], "continues one": measured.token_V4[~starts_V]}
    edges = [1, *(edge for edge in (8, 32, 128, 512, 2048) if edge < len(measured.position_L4))]
    for low, high in pairwise([*edges, len(measured.position_L4)]):
        groups["position"][f"token {low} to {high - 1}"] = measured.position_L4[low:high]
    return {
        kind: {name: _of_sums(sums.sum(0)) for name, sums in some.items() if sums[:, 0].sum()}
        for kind, some in groups.items()
    }


def _of_sums(sums_4: np.ndarray) -> dict[str, float]:
    count, loss, squared, correct = sums_4
    variance = max(squared / count - (loss / count) ** 2, 0.0)
    return {
        "predicted_tokens": int(count),
        "loss": loss / count,
        "loss_stderr": math.sqrt(variance / count),
        "accuracy": correct / count,
    }


def table(result: dict[str, Any], objective: str = "mlm") -> list[str]:
    """The result as lines for a person; of `breakdown` and of other mask rates where they are in it."""
    what = "masked" if objective == "mlm" else "next"
    lines = [
        f"held-out {what}-token loss  {result['loss']:.4f} ± {result['loss_stderr']:.4f} nats"
        f"    unigram entropy    {result['unigram_entropy']:.4f}"
        f"    ({result['unigram_entropy'] - result['loss']:+.2f} nats better)",
        f"{what}-token accuracy       {result['accuracy']:.4f} ± {result['accuracy_stderr']:.4f}"
        f"         majority baseline  {result['majority_accuracy']:.4f}"
        f"    ({result['accuracy'] / result['majority_accuracy']:.1f} times)",
        f"perplexity                 {result['perplexity']:.2f}",
        f"bits per byte              {result['bits_per_byte']:.3f}",
        f"over {result['predicted_tokens']:,} predicted tokens in {result['rows']:,} rows, each row once, fixed masks",
    ]
    for kind, groups in result.get("by", {}).items():
        lines += [f"by {kind}:" if kind != "word" else "by place in the word:", *_rows(groups)]
    if "rates" in result:
        lines += ["by mask rate:", *_rows({f"{float(rate):.0%}": r for rate, r in result["rates"].items()})]
    return lines


def _rows(groups: dict[str, dict[str, float]]) -> list[str]:
    width = max(map(len, groups))
    return [
        f"    {name:{width}}  loss {r['loss']:.4f} ± {r['loss_stderr']:.4f}  accuracy {r['accuracy']:.4f}  "
        f"{r['predicted_tokens']:>9,} tokens"
        for name, r in groups.items()
    ]
