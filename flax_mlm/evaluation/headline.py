"""What two checkpoints are compared by: the main number of a task's result, and the same number over other draws of its
examples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.evaluation import classification, tagging


class Score(NamedTuple):
    """The main number of a result."""

    metric: str
    value: float
    stderr: float
    higher_is_better: bool
    size: int  # how many examples
    examples: Any  # equal for two results exactly when they answered the same questions
    again: Callable[[np.ndarray], float]  # numbers of examples, some repeated -> the metric over them


def headline_metric(result: dict[str, Any]) -> Score:
    """The score of a result of `evaluate`, as it is in its JSON."""
    return {
        "mlm": _mlm,
        "cloze": _cloze,
        "minimal_pairs": _minimal_pairs,
        "classification": _labels,
        "tagging": _tags,
        "retrieval": _retrieval,
    }[result["task"]](result)


def _mlm(result: dict[str, Any]) -> Score:
    counted = "tokens" if result["objective"] == "rtd" else "predicted_tokens"
    loss_R, count_R = (np.array(result["each_row"][name]) for name in ("loss", counted))
    asked = count_R > 0  # not what fills up the last batch, which is as large as it was
    loss_R, count_R = loss_R[asked], count_R[asked]
    kind = {"mlm": "masked", "clm": "next", "rtd": "replaced"}[result["objective"]]

    def again(rows: np.ndarray) -> float:
        return float(loss_R[rows].sum() / count_R[rows].sum())

    replaced_R = np.array(result["each_row"].get("replaced", asked))[asked]  # with rtd they are part of the question
    examples = result["corpus"], result["hidden"], count_R.tolist(), replaced_R.tolist()
    return Score(f"{kind}-token loss", result["loss"], result["loss_stderr"], False, len(loss_R), examples, again)


def _cloze(result: dict[str, Any]) -> Score:
    reciprocal = np.array([1 / answer["rank"] for answer in result["answers"]])
    texts = [answer["text"] for answer in result["answers"]]
    return _mean("mean reciprocal rank", reciprocal, texts)


def _minimal_pairs(result: dict[str, Any]) -> Score:
    right = [value for paradigm in result["paradigms"].values() for value in paradigm["each"]]
    names = [(name, paradigm["pairs"]) for name, paradigm in result["paradigms"].items()]
    return _mean("accuracy", np.array(right), names)


def _mean(metric: str, values_N: np.ndarray, examples: Any) -> Score:
    stderr = float(values_N.std() / len(values_N) ** 0.5)
    return Score(
        metric, float(values_N.mean()), stderr, True, len(values_N), examples, lambda i: float(values_N[i].mean())
    )


def _labels(result: dict[str, Any]) -> Score:
    """The median run's."""
    gold, found = np.array(result["labels"]), np.array(result["predictions"])
    metric, classes = result["metric"], result.get("classes", [])
    if classes:
        gold, found = (np.searchsorted(classes, names) for names in (gold, found))

    def again(numbers: np.ndarray) -> float:
        return classification.evaluate(metric, gold[numbers], found[numbers], len(classes))

    value = again(np.arange(len(gold)))
    return Score(metric, value, result["stderr"], True, len(gold), result["labels"], again)


def _tags(result: dict[str, Any]) -> Score:
    """The median run's."""
    counts_N3 = tagging.counts(result["labels"], result["predictions"])

    def again(numbers: np.ndarray) -> float:
        return tagging.f1(counts_N3[numbers])

    value = again(np.arange(len(counts_N3)))
    return Score("entity F1", value, result["stderr"], True, len(counts_N3), result["labels"], again)


def _retrieval(result: dict[str, Any]) -> Score:
    if result["metric"] == "spearman":
        return _labels(result)
    return _mean(result["metric"], np.array(result["each"]), result["queries"])
