"""Held-out loss and accuracy, with fixed masks and standard errors, beside two context-free baselines."""

import dataclasses
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_mlm.data.mixture import Mixture
from flax_mlm.data.pipeline import eval_batches
from flax_mlm.distributed.batches import local_rows, shard_batch
from flax_mlm.distributed.preemption import Stopped
from flax_mlm.inference.embeddings import OnBatch
from flax_mlm.inference.forward import EvalOutput, build_forward
from flax_mlm.inference.model import LoadedModel


class Measurement(NamedTuple):
    """Sums over predicted tokens, float64: their number, loss (nats), squared loss, and correct predictions."""

    row_R4: np.ndarray  # of each row, corpus by corpus, then of the rows that fill up the last batch
    rows_C: list[int]  # number of rows of each corpus
    token_V4: np.ndarray  # of each token id as the label
    position_L4: np.ndarray  # of each position in a segment
    counts_V: np.ndarray  # int64, occurrences of each token id in the rows; 0 for special tokens


def run(model: LoadedModel, corpus: Mixture, on_batch: OnBatch = lambda: None) -> dict[str, float]:
    """Evaluates on the held-out rows of all corpora, each row once.

    Masks follow from the seed and the row's number, so that every call, on any number of devices, predicts the same
    tokens. With a positive `eval.max_rows` each corpus contributes rows in proportion to its weight.

    Args:
      corpus: its validation splits are used.
      on_batch: called before every batch; a true result stops all processes.

    Raises:
      Stopped: `on_batch` of one of the processes returned true.

    Returns:
      loss (nats per predicted token) and accuracy with their standard errors over rows, perplexity, bits_per_byte
      (tokens of the held-out text × loss / its bytes), rows, predicted_tokens; and of the same rows' tokens
      unigram_entropy (nats) and majority_accuracy (always predicting the most frequent token). With several corpora
      also loss, loss_stderr, accuracy, bits_per_byte and predicted_tokens of each, as `loss/NAME`.
    """
    return summary(measure(model, corpus, on_batch), corpus)


def with_eval(model: LoadedModel, seq_len: int, mask_rate: float) -> LoadedModel:
    """Changes the length of held-out rows and their mask rate; together they fix the number of predictions per row."""
    c = model.config
    if (seq_len, mask_rate) == (c.data.seq_len, c.eval.mask_rate):
        return model
    data, evaluation = dataclasses.replace(c.data, seq_len=seq_len), dataclasses.replace(c.eval, mask_rate=mask_rate)
    config = dataclasses.replace(c, data=data, eval=evaluation)
    return model._replace(config=config, forward=build_forward(config, model.tokenizer.vocab_size, model.mesh))


def measure(model: LoadedModel, corpus: Mixture, on_batch: OnBatch = lambda: None) -> Measurement:
    """Sums what `summary` and `breakdown` are computed from. Arguments and errors are those of `run`."""
    is_special_V = np.asarray(model.vocab.is_special)
    counts_V, token_V4 = np.zeros(len(is_special_V), np.int64), np.zeros((len(is_special_V), 4))
    position_L4, row_R4 = np.zeros((corpus.seq_len, 4)), []
    for tokens, output in eval_outputs(model, corpus, on_batch):
        counts_V += np.bincount(tokens.ravel(), minlength=len(counts_V))
        loss_BK = np.asarray(output.scored.loss_BK, np.float64)
        sums_BK4 = np.stack([output.weights_BK, loss_BK, loss_BK**2, output.scored.correct_BK], axis=-1)
        row_R4.append(sums_BK4.sum(1))
        used = output.weights_BK > 0
        np.add.at(token_V4, output.labels_BK[used], sums_BK4[used])
        np.add.at(position_L4, output.positions_BK[used], sums_BK4[used])
    if jax.process_count() > 1:  # with mesh axis `tensor` several processes read the same rows, all equally often
        counts_V = np.asarray(multihost_utils.process_allgather(counts_V)).sum(0)
        own = len(local_rows(model.mesh, model.config.eval.batch_size))
        counts_V //= jax.process_count() * own // model.config.eval.batch_size
    counts_V = np.where(is_special_V, 0, counts_V)
    rows_C = [len(indices) for indices in corpus.held_out(model.config.eval.max_rows)]
    return Measurement(np.concatenate(row_R4), rows_C, token_V4, position_L4, counts_V)


def eval_outputs(model: LoadedModel, corpus: Mixture, on_batch: OnBatch) -> Iterator[tuple[np.ndarray, EvalOutput]]:
    """Yields for every batch of held-out rows the tokens of this process, and the model's output for all rows.

    The rows that fill up the last batch are padding and have nothing to predict.
    """
    config = model.config
    for batch in eval_batches(
        corpus.split("validation"),
        np.concatenate(corpus.held_out(config.eval.max_rows)),
        batch_size=config.eval.batch_size,
        local_rows=local_rows(model.mesh, config.eval.batch_size),
    ):
        with jax.set_mesh(model.mesh):
            global_batch = shard_batch(batch, model.mesh, stop=bool(on_batch()))
            output, stop = jax.device_get(model.forward.evaluate(model.params, global_batch, model.vocab))
        if stop:
            raise Stopped
        yield batch["tokens"], output


def summary(measurement: Measurement, corpus: Mixture) -> dict[str, float]:
    """Computes the result of `run`."""
    counts_V = measurement.counts_V
    frequency_V = counts_V[counts_V > 0] / counts_V.sum()
    held_out = [c.counts["validation"] for c in corpus.corpora.values()]
    fraction_C = [n / max(counts["rows"], 1) for n, counts in zip(measurement.rows_C, held_out, strict=True)]
    tokens_C, bytes_C = ([f * c[key] for f, c in zip(fraction_C, held_out, strict=True)] for key in ("tokens", "bytes"))
    total = _row_metrics(measurement.row_R4, sum(tokens_C), sum(bytes_C))
    result = {
        **{name: total[name] for name in ("loss", "loss_stderr", "accuracy", "accuracy_stderr")},
        "perplexity": math.exp(min(total["loss"], 700.0)),
        "bits_per_byte": total["bits_per_byte"],
        "unigram_entropy": float(-(frequency_V * np.log(frequency_V)).sum()),
        "majority_accuracy": float(frequency_V.max()),
        "rows": int((measurement.row_R4[:, 0] > 0).sum()),
        "predicted_tokens": total["predicted_tokens"],
    }
    text_size = dict(zip(corpus.corpora, zip(tokens_C, bytes_C, strict=True), strict=True))
    for name, rows_R4 in split_by_corpus(measurement.row_R4, measurement.rows_C, corpus).items():
        values = _row_metrics(rows_R4, *text_size[name])
        result |= {f"{key}/{name}": values[key] for key in values if key != "accuracy_stderr"}
    return result


def split_by_corpus(sums_RN: np.ndarray, rows_C: list[int], corpus: Mixture) -> dict[str, np.ndarray]:
    """Splits rows by corpus, without corpora that have no predictions; empty with a single corpus.

    Args:
      sums_RN: sums of each row, corpus by corpus, then of the rows that fill up the last batch; the first of the N is
        the number of predictions.
      rows_C: number of rows of each corpus.
    """
    parts = zip(corpus.corpora, np.split(sums_RN, np.cumsum(rows_C))[:-1], strict=True)
    return {name: rows for name, rows in parts if len(corpus.corpora) > 1 and rows[:, 0].any()}


def ratio_stderr(sum_R: np.ndarray, count_R: np.ndarray) -> float:
    """Standard error over rows of the ratio sum_R.sum() / count_R.sum()."""
    total = count_R.sum()
    return math.sqrt(np.square(sum_R - sum_R.sum() / total * count_R).sum()) / total


def _row_metrics(sums_R4: np.ndarray, num_tokens: float, num_bytes: float) -> dict[str, float]:
    """Computes metrics of rows whose text has so many tokens and bytes."""
    count_R, loss_R, _, correct_R = sums_R4.T
    total = count_R.sum()
    loss = loss_R.sum() / total
    return {
        "loss": loss,
        "loss_stderr": ratio_stderr(loss_R, count_R),
        "accuracy": correct_R.sum() / total,
        "accuracy_stderr": ratio_stderr(correct_R, count_R),
        "bits_per_byte": loss / math.log(2) * num_tokens / num_bytes,
        "predicted_tokens": int(total),
    }


def breakdown(measurement: Measurement, starts_word_V: np.ndarray) -> dict[str, dict[str, dict[str, float]]]:
    """Groups predicted tokens by frequency rank in the held-out rows, by position in the word and in the segment.

    Args:
      starts_word_V: bool, whether a token begins a word.

    Returns:
      kind -> group -> predicted_tokens, loss, loss_stderr (over tokens) and accuracy; groups without tokens are left
      out.
    """
    token_V4, position_L4 = measurement.token_V4, measurement.position_L4
    ranked = np.argsort(-measurement.counts_V, kind="stable")[: (measurement.counts_V > 0).sum()]
    groups: dict[str, dict[str, np.ndarray]] = {"frequency": {}, "word": {}, "position": {}}
    for low, high in ((0, 100), (100, 1000), (1000, 10_000), (10_000, len(token_V4))):
        groups["frequency"][f"rank {low + 1:,} to {high:,}"] = token_V4[ranked[low:high]]
    groups["word"] = {"starts a word": token_V4[starts_word_V], "continues one": token_V4[~starts_word_V]}
    edges = [1, *(edge for edge in (8, 32, 128, 512, 2048) if edge < len(position_L4))]
    for low, high in pairwise([*edges, len(position_L4)]):
        groups["position"][f"token {low} to {high - 1}"] = position_L4[low:high]
    return {
        kind: {name: _group_metrics(sums.sum(0)) for name, sums in some.items() if sums[:, 0].sum()}
        for kind, some in groups.items()
    }


def _group_metrics(sums_4: np.ndarray) -> dict[str, float]:
    count, loss, squared, correct = sums_4
    variance = max(squared / count - (loss / count) ** 2, 0.0)
    return {
        "predicted_tokens": int(count),
        "loss": loss / count,
        "loss_stderr": math.sqrt(variance / count),
        "accuracy": correct / count,
    }


def table(result: dict[str, Any], objective: str = "mlm") -> list[str]:
    """Formats a result as lines of text, with its breakdown and other mask rates where it has them."""
    kind = "masked" if objective == "mlm" else "next"
    lines = [
        f"held-out {kind}-token loss  {result['loss']:.4f} ± {result['loss_stderr']:.4f} nats"
        f"    unigram entropy    {result['unigram_entropy']:.4f}"
        f"    ({result['unigram_entropy'] - result['loss']:+.2f} nats better)",
        f"{kind}-token accuracy       {result['accuracy']:.4f} ± {result['accuracy_stderr']:.4f}"
        f"         majority baseline  {result['majority_accuracy']:.4f}"
        f"    ({result['accuracy'] / result['majority_accuracy']:.1f} times)",
        f"perplexity                 {result['perplexity']:.2f}",
        f"bits per byte              {result['bits_per_byte']:.3f}",
        f"over {result['predicted_tokens']:,} predicted tokens in {result['rows']:,} rows, each row once, fixed masks",
    ]
    lines += corpus_lines(result, "predicted_tokens")
    for kind, groups in result.get("by", {}).items():
        lines += [f"by {kind}:" if kind != "word" else "by position in the word:", *_group_lines(groups)]
    if "rates" in result:
        lines += ["by mask rate:", *_group_lines({f"{float(rate):.0%}": r for rate, r in result["rates"].items()})]
    return lines


def corpus_lines(result: dict[str, Any], count_key: str) -> list[str]:
    """Formats the metrics of each of several corpora; `count_key` names the number of tokens of its losses."""
    keys = {"loss": "loss", "loss_stderr": "loss_stderr", "accuracy": "accuracy", "predicted_tokens": count_key}
    names = corpus_names(result)
    groups = {name: {key: result[f"{source}/{name}"] for key, source in keys.items()} for name in names}
    return ["by corpus:", *_group_lines(groups)] if groups else []


def corpus_names(result: dict[str, Any]) -> list[str]:
    """Names of the corpora that a result has metrics of."""
    return [key.removeprefix("loss/") for key in result if key.startswith("loss/")]


def _group_lines(groups: dict[str, dict[str, float]]) -> list[str]:
    width = max(map(len, groups))
    return [
        f"    {name:{width}}  loss {r['loss']:.4f} ± {r['loss_stderr']:.4f}  accuracy {r['accuracy']:.4f}  "
        f"{r['predicted_tokens']:>9,} tokens"
        for name, r in groups.items()
    ]
