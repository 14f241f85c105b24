"""Headline metric of a task's result, which `compare` resamples to tell two checkpoints apart."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.evaluation import metrics


class HeadlineMetric(NamedTuple):
    """The main metric of a result, with its bootstrap."""

    metric: str
    value: float
    stderr: float
    higher_is_better: bool
    num_examples: int
    examples: Any  # equal for two results exactly when they answer the same questions
    resample: Callable[[np.ndarray], float]  # indices of examples, with repetitions -> value


def mlm(result: dict[str, Any]) -> HeadlineMetric:
    """Held-out loss, of mlm, clm and rtd."""
    count_key = "tokens" if result["objective"] == "rtd" else "predicted_tokens"
    loss_R, count_R = (np.array(result["each_row"][key]) for key in ("loss", count_key))
    used = count_R > 0  # rows that fill up the last batch have no predictions, and depend on the batch size
    loss_R, count_R = loss_R[used], count_R[used]
    kind = {"mlm": "masked", "clm": "next", "rtd": "replaced"}[result["objective"]]
    replaced_R = np.array(result["each_row"].get("replaced", used))[used]  # the generator's choices, with rtd
    return HeadlineMetric(
        f"{kind}-token loss",
        result["loss"],
        result["loss_stderr"],
        higher_is_better=False,
        num_examples=len(loss_R),
        examples=(result["corpus"], result["hidden"], count_R.tolist(), replaced_R.tolist()),
        resample=lambda rows: float(loss_R[rows].sum() / count_R[rows].sum()),
    )


def cloze(result: dict[str, Any]) -> HeadlineMetric:
    """Mean reciprocal rank of the answers."""
    reciprocal_ranks = np.array([1 / answer["rank"] for answer in result["answers"]])
    return _mean("mean reciprocal rank", reciprocal_ranks, [answer["text"] for answer in result["answers"]])


def minimal_pairs(result: dict[str, Any]) -> HeadlineMetric:
    """Accuracy over the pairs of all paradigms."""
    correct = [value for paradigm in result["paradigms"].values() for value in paradigm["each"]]
    paradigms = [(name, paradigm["pairs"]) for name, paradigm in result["paradigms"].items()]
    return _mean("accuracy", np.array(correct), paradigms)


def classification(result: dict[str, Any]) -> HeadlineMetric:
    """The metric of the median run, of labels or numbers."""
    labels, predictions = np.array(result["labels"]), np.array(result["predictions"])
    metric, classes = result["metric"], result.get("classes", [])
    if classes:
        labels, predictions = np.searchsorted(classes, labels), np.searchsorted(classes, predictions)
    return _resampled(
        metric, result, lambda i: metrics.evaluate(metric, labels[i], predictions[i], num_classes=len(classes))
    )


def tagging(result: dict[str, Any]) -> HeadlineMetric:
    """Entity F1 of the median run."""
    counts_N3 = metrics.entity_counts(result["labels"], result["predictions"])
    return _resampled("entity F1", result, lambda i: metrics.entity_f1(counts_N3[i]))


def retrieval(result: dict[str, Any]) -> HeadlineMetric:
    """Spearman's correlation of pairs of sentences, or nDCG@10 of a benchmark."""
    if result["metric"] == "spearman":
        return classification(result)
    return _mean(result["metric"], np.array(result["each"]), result["queries"])


def _mean(metric: str, values_N: np.ndarray, examples: Any) -> HeadlineMetric:
    value, stderr = float(values_N.mean()), float(values_N.std() / len(values_N) ** 0.5)
    return HeadlineMetric(
        metric, value, stderr, True, len(values_N), examples, resample=lambda i: float(values_N[i].mean())
    )


def _resampled(metric: str, result: dict[str, Any], resample: Callable[[np.ndarray], float]) -> HeadlineMetric:
    size = len(result["labels"])
    value = resample(np.arange(size))
    return HeadlineMetric(metric, value, result["stderr"], True, size, result["labels"], resample)
