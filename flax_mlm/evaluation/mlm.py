"""Held-out loss and accuracy, with fixed masks and standard errors, beside two context-free baselines."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_mlm.data.mixture import Mixture, open_corpus
from flax_mlm.data.pipeline import eval_batches
from flax_mlm.distributed import batches, mesh, preemption
from flax_mlm.errors import UserError
from flax_mlm.evaluation import metrics, report, rtd
from flax_mlm.inference.forward import EvalOutput, build_forward, check_finite
from flax_mlm.inference.load import LoadedModel, OnBatch


class Measurement(NamedTuple):
    """Sums over predicted tokens, float64: their number, loss (nats), squared loss, and correct predictions."""

    row_R4: np.ndarray  # of each row, corpus by corpus, then of the rows that fill up the last batch
    num_rows: dict[str, int]  # of each corpus
    token_V4: np.ndarray  # of each token id as the label
    position_L4: np.ndarray  # of each position in a segment
    counts_V: np.ndarray  # int64, occurrences of each token id in the rows; 0 for special tokens


def run(model: LoadedModel, corpus: Mixture, on_batch: OnBatch = lambda: None) -> dict[str, float]:
    """Evaluates on the held-out rows of all corpora, each row once; with rtd see `rtd.summary`.

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
      unigram_entropy (nats) and majority_accuracy (always predicting the most frequent token); tokens_per_word and
      tokens_per_byte of the held-out text. With several corpora also loss, loss_stderr, accuracy, bits_per_byte, rows,
      predicted_tokens, tokens_per_word and tokens_per_byte of each, as `loss/NAME`; of a corpus without predictions no
      loss, accuracy and bits_per_byte.
    """
    if model.config.objective.name == "rtd":
        return _rtd_summary(model, corpus, rtd.measure(eval_outputs(model, corpus, on_batch)))
    return summary(measure(model, corpus, on_batch), corpus)


def _rtd_summary(model: LoadedModel, corpus: Mixture, sums: dict[str, np.ndarray]) -> dict[str, float]:
    return {**rtd.summary(sums, _num_rows(model, corpus)), **_fertility(corpus)}


def _fertility(corpus: Mixture) -> dict[str, float]:
    return metrics.fertility({name: part.counts["validation"] for name, part in corpus.corpora.items()})


def evaluate(model: LoadedModel, on_batch: OnBatch, mask_rates: str) -> dict[str, Any]:
    """Runs the task on the corpus of the config, with a breakdown and what `compare` needs.

    Args:
      mask_rates: fractions, separated by commas; with mlm, additional mask rates to evaluate at.

    Raises:
      UserError: the corpus cannot be used, or a rate is no fraction.
    """
    config, rates = model.config, _parse_rates(mask_rates)
    mesh.check_batch("eval.batch_size", config.eval.batch_size, model.mesh)
    corpus = open_corpus(config)
    if corpus.tokenizer().fingerprint != model.tokenizer.fingerprint:
        raise UserError(f"data.corpus is {corpus}, which was made with another tokenizer than the checkpoint")
    if model.meta and model.meta["corpus"] != corpus.fingerprint and not config.train.phases:
        print("note: not the corpus this model was validated on; its rows may have been trained on", file=sys.stderr)
    if not model.meta:  # a folder says nothing of its text
        what = f"the held-out text is of {corpus.about['name']}, not of the model's own training text"
        print(f"note: {what}; name another with --config.data.source or --config.data.corpus", file=sys.stderr)
    model = with_eval(model, corpus.seq_len, config.eval.mask_rate)
    common = {"corpus": corpus.fingerprint, "hidden": [*config.objective.masking_signature, config.eval.mask_rate]}
    if config.objective.name == "rtd":
        sums = rtd.measure(eval_outputs(model, corpus, on_batch))
        each_row = {name: sums[name].tolist() for name in ("loss", "tokens", "replaced")}
        return {**_rtd_summary(model, corpus, sums), **common, "each_row": each_row}
    measured = measure(model, corpus, on_batch)
    count_R, loss_R, *_ = measured.row_R4.T
    result: dict[str, Any] = {
        **summary(measured, corpus),
        **common,
        "by": breakdown(measured, model.tokenizer.starts_word),
        "each_row": {"loss": loss_R.tolist(), "predicted_tokens": count_R.tolist()},
    }
    if config.objective.name == "mlm" and rates:
        models = {f"{rate:g}": with_eval(model, corpus.seq_len, rate) for rate in rates}
        result["rates"] = {rate: run(other, corpus, on_batch) for rate, other in models.items()}
    return result


def _parse_rates(text: str) -> list[float]:
    with contextlib.suppress(ValueError):
        rates = [float(rate) for rate in text.split(",") if rate.strip()]
        if all(0 < rate <= 1 for rate in rates):
            return rates
    raise UserError(f"--mask_rates is '{text}'; expected fractions such as 0.15,0.3")


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
        own = len(batches.local_rows(model.mesh, model.config.eval.batch_size))
        counts_V //= jax.process_count() * own // model.config.eval.batch_size
    counts_V = np.where(is_special_V, 0, counts_V)
    return Measurement(np.concatenate(row_R4), _num_rows(model, corpus), token_V4, position_L4, counts_V)


def _num_rows(model: LoadedModel, corpus: Mixture) -> dict[str, int]:
    held_out = corpus.held_out(model.config.eval.max_rows)
    return {name: len(indices) for name, indices in zip(corpus.corpora, held_out, strict=True)}


def eval_outputs(model: LoadedModel, corpus: Mixture, on_batch: OnBatch) -> Iterator[tuple[np.ndarray, EvalOutput]]:
    """Yields for every batch of held-out rows the tokens of this process, and the model's output for all rows.

    The rows that fill up the last batch are padding and have nothing to predict.

    Raises:
      Stopped: `on_batch` of one of the processes returned true.
      NotFinite: the model computes NaN or infinity.
    """
    numbers, size = np.concatenate(corpus.held_out(model.config.eval.max_rows)), model.config.eval.batch_size
    own_rows = batches.local_rows(model.mesh, size)
    for batch in eval_batches(corpus.split("validation"), numbers, batch_size=size, local_rows=own_rows):
        with mesh.use_mesh(model.mesh):
            global_batch = batches.shard_batch(batch, model.mesh, stop=bool(on_batch()))
            output, stop = jax.device_get(model.forward.evaluate(model.params, global_batch, model.vocab))
        if stop:
            raise preemption.Stopped
        check_finite(output.scored)
        yield batch["tokens"], output


def summary(m: Measurement, corpus: Mixture) -> dict[str, float]:
    """Computes the result of `run`."""
    count_R, loss_R, _, correct_R = m.row_R4.T
    frequency_V = m.counts_V[m.counts_V > 0] / m.counts_V.sum()
    text_sizes: dict[str, list[float]] = {}  # tokens and bytes of the rows of each corpus
    for name, num_rows in m.num_rows.items():
        counts = corpus.corpora[name].counts["validation"]
        text_sizes[name] = [num_rows / max(counts["rows"], 1) * counts[key] for key in ("tokens", "bytes")]
    total = metrics.loss_and_accuracy(count_R, loss_R, correct_R)
    by_corpus = metrics.by_corpus((count_R, loss_R, correct_R), m.num_rows, "predicted_tokens")
    for name in metrics.corpus_names(by_corpus):
        by_corpus[f"bits_per_byte/{name}"] = _bits_per_byte(by_corpus[f"loss/{name}"], text_sizes[name])
    return {
        **total,
        "perplexity": math.exp(min(total["loss"], 700.0)),
        "bits_per_byte": _bits_per_byte(total["loss"], *text_sizes.values()),
        "unigram_entropy": float(-(frequency_V * np.log(frequency_V)).sum()),
        "majority_accuracy": float(frequency_V.max()),
        "rows": int((count_R > 0).sum()),
        "predicted_tokens": int(count_R.sum()),
        **_fertility(corpus),
        **by_corpus,
    }


def _bits_per_byte(loss: float, *text_sizes: list[float]) -> float:
    tokens, num_bytes = map(sum, zip(*text_sizes, strict=True))
    return loss / math.log(2) * tokens / num_bytes


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
    ranks = pairwise([0, 100, 1000, 10_000, len(token_V4)])
    edges = [1, *(edge for edge in (8, 32, 128, 512, 2048) if edge < len(position_L4)), len(position_L4)]
    groups = {
        "frequency": {f"rank {low + 1:,} to {high:,}": token_V4[ranked[low:high]] for low, high in ranks},
        "word": {"starts a word": token_V4[starts_word_V], "continues one": token_V4[~starts_word_V]},
        "position": {f"token {low} to {high - 1}": position_L4[low:high] for low, high in pairwise(edges)},
    }
    return {
        kind: {name: _group_metrics(sums.sum(0)) for name, sums in some.items() if sums[:, 0].sum()}
        for kind, some in groups.items()
    }


def _group_metrics(sums_4: np.ndarray) -> dict[str, float]:
    count, loss, squared, correct = sums_4
    stderr = math.sqrt(max(squared / count - (loss / count) ** 2, 0.0) / count)
    return {"predicted_tokens": int(count), "loss": loss / count, "loss_stderr": stderr, "accuracy": correct / count}


def table(result: dict[str, Any]) -> list[str]:
    """Formats a result with its `objective` as lines of text, with its breakdown and other mask rates."""
    if result["objective"] == "rtd":
        return rtd.table(result)
    kind = "masked" if result["objective"] == "mlm" else "next"
    gain = result["unigram_entropy"] - result["loss"]
    lines = [
        f"held-out {kind}-token loss  {result['loss']:.4f} ± {result['loss_stderr']:.4f} nats"
        f"    unigram entropy    {result['unigram_entropy']:.4f}"
        f"    ({abs(gain):.2f} nats {'better' if gain >= 0 else 'worse'})",
        f"{kind}-token accuracy       {result['accuracy']:.4f} ± {result['accuracy_stderr']:.4f}"
        f"         majority baseline  {result['majority_accuracy']:.4f}"
        f"    ({result['accuracy'] / result['majority_accuracy']:.1f} times)",
        f"perplexity                 {result['perplexity']:.2f}",
        f"bits per byte              {result['bits_per_byte']:.3f}",
        f"over {result['predicted_tokens']:,} predicted tokens in {result['rows']:,} rows, each row once, fixed masks",
    ]
    lines += report.corpus_lines(result, "predicted_tokens")
    for kind, groups in result.get("by", {}).items():
        lines += [f"by {kind}:" if kind != "word" else "by position in the word:", *report.group_lines(groups)]
    if rates := result.get("rates"):
        lines += ["by mask rate:", *report.group_lines({f"{float(rate):.0%}": r for rate, r in rates.items()})]
    return lines
