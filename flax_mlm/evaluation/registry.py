"""Tasks of `evaluate`: the flags that each one takes, and its headline metric, which `compare` resamples.

A task is the module of its name, which is imported only when the task runs, since it imports JAX.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.evaluation import metrics


class HeadlineMetric(NamedTuple):
    """The main metric of a result, with its bootstrap."""

    metric: str
    value: float
    stderr: float
    num_examples: int
    examples: Any  # equal for two results exactly when they answer the same questions
    resample: Callable[[np.ndarray], float]  # indices of examples, with repetitions -> value
    higher_is_better: bool = True


def _mlm(result: dict[str, Any]) -> HeadlineMetric:
    """Held-out loss, of mlm, clm and rtd."""
    count_key = "tokens" if result["objective"] == "rtd" else "predicted_tokens"
    loss_R, count_R = (np.array(result["each_row"][key]) for key in ("loss", count_key))
    used = count_R > 0  # rows that fill up the last batch have no predictions, and depend on the batch size
    loss_R, count_R = loss_R[used], count_R[used]
    kind = {"mlm": "masked", "clm": "next", "rtd": "replaced"}[result["objective"]]
    replaced_R = np.array(result["each_row"].get("replaced", used))[used]  # the generator's choices, with rtd
    examples = result["corpus"], result["hidden"], count_R.tolist(), replaced_R.tolist()

    def resample(rows: np.ndarray) -> float:
        return float(loss_R[rows].sum() / count_R[rows].sum())

    name, size = f"{kind}-token loss", len(loss_R)
    return HeadlineMetric(name, result["loss"], result["loss_stderr"], size, examples, resample, False)


def _cloze(result: dict[str, Any]) -> HeadlineMetric:
    """Mean reciprocal rank of the answers."""
    reciprocal_ranks = np.array([1 / answer["rank"] for answer in result["answers"]])
    return _mean("mean reciprocal rank", reciprocal_ranks, [answer["text"] for answer in result["answers"]])


def _minimal_pairs(result: dict[str, Any]) -> HeadlineMetric:
    """Accuracy over the pairs of all paradigms."""
    correct = [value for paradigm in result["paradigms"].values() for value in paradigm["each"]]
    paradigms = [(name, paradigm["pairs"]) for name, paradigm in result["paradigms"].items()]
    return _mean("accuracy", np.array(correct), paradigms)


def _classification(result: dict[str, Any]) -> HeadlineMetric:
    """The metric of the median run, of labels or numbers."""
    metric, classes = result["metric"], result.get("classes", [])
    labels: Any = result["labels"]
    predictions: Any = result["predictions"]
    if metric in metrics.MULTI_LABEL:
        labels, predictions = (_indicators(result[key], classes) for key in ("labels", "predictions"))
    elif classes:
        ids = {label: i for i, label in enumerate(classes)}
        labels, predictions = (np.array([ids[label] for label in given]) for given in (labels, predictions))
    else:
        labels, predictions = np.array(labels), np.array(predictions)
    return _resampled(metric, result, lambda i: metrics.evaluate(metric, labels[i], predictions[i], len(classes)))


def _indicators(label_sets: list[list[str]], classes: list[str]) -> np.ndarray:
    """Converts sets of labels to an array (N, C) of 0 and 1."""
    return np.array([[label in labels for label in classes] for labels in label_sets], np.float32)


def _tagging(result: dict[str, Any]) -> HeadlineMetric:
    """Entity F1 of the median run."""
    counts_N3 = metrics.entity_counts(result["labels"], result["predictions"])
    return _resampled("entity F1", result, lambda i: metrics.entity_f1(counts_N3[i]))


def _retrieval(result: dict[str, Any]) -> HeadlineMetric:
    """Spearman's correlation of pairs of sentences, or nDCG@10 of a benchmark."""
    if result["metric"] == "spearman":
        return _classification(result)
    return _mean(result["metric"], np.array(result["each"]), result["queries"])


def _mean(metric: str, values_N: np.ndarray, examples: Any) -> HeadlineMetric:
    value, stderr = float(values_N.mean()), float(values_N.std() / len(values_N) ** 0.5)
    return HeadlineMetric(metric, value, stderr, len(values_N), examples, lambda i: float(values_N[i].mean()))


def _resampled(metric: str, result: dict[str, Any], resample: Callable[[np.ndarray], float]) -> HeadlineMetric:
    size = len(result["labels"])
    return HeadlineMetric(metric, resample(np.arange(size)), result["stderr"], size, result["labels"], resample)


class Task(NamedTuple):
    """One value of `--task`."""

    help: str
    flags: tuple[str, ...]  # keyword arguments of the module's `evaluate`
    headline: Callable[[dict[str, Any]], HeadlineMetric]  # result -> what `compare` compares


_SPLITS = ("train", "dev", "test")
_COLUMNS = ("text", "pair", "label")

_CLASSIFICATION = (*_SPLITS, *_COLUMNS, "label_separator", "metric", "save")

TASKS = {
    "mlm": Task("loss and accuracy on held-out rows, with the model's own objective", ("mask_rates",), _mlm),
    "cloze": Task("rank of the words that belong in a [MASK]", ("data",), _cloze),
    "minimal_pairs": Task("how often the good sentence of a pair is likelier", ("data", "variant"), _minimal_pairs),
    "classification": Task("fine-tuning for labels or numbers", _CLASSIFICATION, _classification),
    "tagging": Task("fine-tuning for tags of words", (*_SPLITS, "columns", "save"), _tagging),
    "retrieval": Task("vectors for search, as they are or fine-tuned", (*_SPLITS, *_COLUMNS, "save"), _retrieval),
}


def evaluate(task: str, model: Any, on_batch: Callable[[], Any], **flags: Any) -> tuple[dict[str, Any], list[str]]:
    """Runs a task; returns its result, and the result's table as lines of text.

    Args:
      model: a `LoadedModel`.
      on_batch: called before every batch.
      flags: values of the task's flags.

    Raises:
      UserError: the task cannot be run with this model or these flags.
    """
    if "train" not in TASKS[task].flags:  # what is not fine-tuned uses the model's own head
        model.require_head()
    module = importlib.import_module(f"flax_mlm.evaluation.{task}")
    result = {"task": task, "objective": model.config.objective.name, **module.evaluate(model, on_batch, **flags)}
    return result, module.table(result)


def headline_metric(result: dict[str, Any]) -> HeadlineMetric:
    """Returns the headline metric of a result that `evaluate --json` wrote."""
    return TASKS[result["task"]].headline(result)
