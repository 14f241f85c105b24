"""Held-out loss and accuracy, with fixed masks and standard errors, beside two context-free baselines."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_mlm.data.mixture import Mixture
from flax_mlm.data.pipeline import eval_batches
from flax_mlm.distributed.batches import local_rows, shard_batch
from flax_mlm.distributed.preemption import Stopped
from flax_mlm.inference.load import LoadedModel
from flax_mlm.training.step import EvalOutput


class Measured(NamedTuple):
    """Sums over predicted tokens, float64. The four sums are: how many, loss (nats), loss squared, correct ones."""

    row_R4: np.ndarray  # for each row, one corpus after another, and of the rows that fill the last batch
    rows_C: list[int]  # how many rows of each corpus
    token_V4: np.ndarray  # for each piece that was to be predicted
    position_L4: np.ndarray  # for each position in a segment
    counts_V: np.ndarray  # int64, how often each piece is in the rows; 0 for special ones


def run(trained: LoadedModel, corpus: Mixture, poll: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Evaluates on the held-out rows, each once. Masks follow from the seed and the row's number, so that every
    call, on any number of devices, predicts the same tokens.

    Of several corpora these are the held-out rows of all: every one of them, not in proportion to the weights; or, when
    `eval.max_rows` is positive, so many, to which each corpus gives its share by weight.

    Args:
      trained: The model.
      corpus: Its validation splits are used.
      poll: Called before every batch; says whether this process wants to stop.

    Raises:
      Stopped: one of the processes wants to.

    Returns:
      loss (nats per predicted token) and accuracy with their standard errors over rows, perplexity,
      bits_per_byte (tokens of the held-out text × loss / its bytes), rows, predicted_tokens; and of the same
      rows' tokens unigram_entropy (nats) and majority_accuracy (always saying the most frequent token). Of several
      corpora also loss, loss_stderr, accuracy, bits_per_byte and predicted_tokens of each, as `loss/NAME`.
    """
    return summary(measure(trained, corpus, poll), corpus)


def measure(trained: LoadedModel, corpus: Mixture, poll: Callable[[], bool]) -> Measured:
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
    if jax.process_count() > 1:  # each has seen its own rows, or with `tensor` also those of others: all equally often
        counts_V = np.asarray(multihost_utils.process_allgather(counts_V)).sum(0)
        own = len(local_rows(trained.mesh, trained.config.eval.batch_size))
        counts_V //= jax.process_count() * own // trained.config.eval.batch_size
    counts_V = np.where(is_special_V, 0, counts_V)
    numbers = corpus.held_out(trained.config.eval.max_rows)
    return Measured(np.concatenate(row_R4), [len(n) for n in numbers], token_V4, position_L4, counts_V)


def answers(trained: LoadedModel, corpus: Mixture, poll: Callable[[], bool]) -> Iterator[tuple[np.ndarray, EvalOutput]]:
    """For every batch of the held-out rows the tokens of this process, and what the model says of all rows; those that
    fill up the last batch are all padding and have nothing to predict."""
    config = trained.config
    for batch in eval_batches(
        corpus.split("validation"),
        np.concatenate(corpus.held_out(config.eval.max_rows)),
        batch_size=config.eval.batch_size,
        local_rows=local_rows(trained.mesh, config.eval.batch_size),
    ):
        global_batch = shard_batch(batch, trained.mesh, stop=poll())
        found, stop = jax.device_get(trained.steps.evaluate(trained.params, global_batch, trained.vocab))
        if stop:
            raise Stopped
        yield batch["tokens"], found


def summary(measured: Measured, corpus: Mixture) -> dict[str, float]:
    """What `run` returns."""
    counts_V = measured.counts_V
    frequency_V = counts_V[counts_V > 0] / counts_V.sum()
    held_out = [c.counts["validation"] for c in corpus.corpora.values()]
    seen_C = [n / max(counts["rows"], 1) for n, counts in zip(measured.rows_C, held_out, strict=True)]
    tokens_C, bytes_C = ([n * c[key] for n, c in zip(seen_C, held_out, strict=True)] for key in ("tokens", "bytes"))
    whole = _of_rows(measured.row_R4, sum(tokens_C), sum(bytes_C))
    result = {
        **{name: whole[name] for name in ("loss", "loss_stderr", "accuracy", "accuracy_stderr")},
        "perplexity": math.exp(min(whole["loss"], 700.0)),
        "bits_per_byte": whole["bits_per_byte"],
        "unigram_entropy": float(-(frequency_V * np.log(frequency_V)).sum()),
        "majority_accuracy": float(frequency_V.max()),
        "rows": int((measured.row_R4[:, 0] > 0).sum()),
        "predicted_tokens": whole["predicted_tokens"],
    }
    text = dict(zip(corpus.corpora, zip(tokens_C, bytes_C, strict=True), strict=True))
    for name, rows_R4 in rows_of_each(measured.row_R4, measured.rows_C, corpus).items():
        part = _of_rows(rows_R4, *text[name])
        result |= {f"{key}/{name}": part[key] for key in part if key != "accuracy_stderr"}
    return result


def rows_of_each(sums_RN: np.ndarray, rows_C: list[int], corpus: Mixture) -> dict[str, np.ndarray]:
    """Of several corpora the rows of each whose count, the first of the sums, is not 0 in all; of a single one nothing.

    Args:
      sums_RN: of one corpus after another, and of the rows that fill the last batch.
      rows_C: how many rows of each.
    """
    parts = zip(corpus.corpora, np.split(sums_RN, np.cumsum(rows_C))[:-1], strict=True)
    return {name: rows for name, rows in parts if len(corpus.corpora) > 1 and rows[:, 0].any()}


def ratio_stderr(sum_R: np.ndarray, count_R: np.ndarray) -> float:
    """Standard error of sum_R.sum() / count_R.sum(), a mean over what R rows have some of each; over the rows."""
    total = count_R.sum()
    return math.sqrt(np.square(sum_R - sum_R.sum() / total * count_R).sum()) / total


def _of_rows(sums_R4: np.ndarray, tokens: float, size: float) -> dict[str, float]:
    """Of rows whose text has so many tokens and bytes."""
    count_R, loss_R, _, correct_R = sums_R4.T
    total = count_R.sum()
    loss = loss_R.sum() / total
    return {
        "loss": loss,
        "loss_stderr": ratio_stderr(loss_R, count_R),
        "accuracy": correct_R.sum() / total,
        "accuracy_stderr": ratio_stderr(correct_R, count_R),
        "bits_per_byte": loss / math.log(2) * tokens / size,
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
    lines += by_corpus(result, "predicted_tokens")
    for kind, groups in result.get("by", {}).items():
        lines += [f"by {kind}:" if kind != "word" else "by place in the word:", *_rows(groups)]
    if "rates" in result:
        lines += ["by mask rate:", *_rows({f"{float(rate):.0%}": r for rate, r in result["rates"].items()})]
    return lines


def by_corpus(result: dict[str, Any], counted: str) -> list[str]:
    """Lines of what a result says of each of several corpora; `counted`: over what its losses are means."""
    shown = {"loss": "loss", "loss_stderr": "loss_stderr", "accuracy": "accuracy", "predicted_tokens": counted}
    groups = {name: {key: result[f"{what}/{name}"] for key, what in shown.items()} for name in of_each(result)}
    return ["by corpus:", *_rows(groups)] if groups else []


def of_each(result: dict[str, Any]) -> list[str]:
    """The names of the corpora that a result tells apart."""
    return [key.removeprefix("loss/") for key in result if key.startswith("loss/")]


def _rows(groups: dict[str, dict[str, float]]) -> list[str]:
    width = max(map(len, groups))
    return [
        f"    {name:{width}}  loss {r['loss']:.4f} ± {r['loss_stderr']:.4f}  accuracy {r['accuracy']:.4f}  "
        f"{r['predicted_tokens']:>9,} tokens"
        for name, r in groups.items()
    ]
