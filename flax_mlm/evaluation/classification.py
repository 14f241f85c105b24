"""Fine-tuning for a label or number of a text or of a pair of texts, as in GLUE (Wang et al. 2018).

Learning rates are compared on the development set with the first seed; the best one is then used with every seed.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_mlm.data import tables
from flax_mlm.errors import UserError
from flax_mlm.evaluation import labels as task_labels
from flax_mlm.evaluation import metrics, report
from flax_mlm.finetuning import heads, loop
from flax_mlm.inference import embeddings
from flax_mlm.inference.load import LoadedModel, Log, OnBatch

_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)


def run(
    model: LoadedModel,
    train: tables.Labelled,
    dev: tables.Labelled | None = None,
    test: tables.Labelled | None = None,
    metric: str = "accuracy",
    log: Log = lambda line: None,
    on_batch: OnBatch = lambda: None,
) -> dict[str, Any]:
    """Fine-tunes and evaluates on `test`, or on `dev` where there is no test set.

    Args:
      dev: chooses learning rate and epoch; None: a tenth of `train`.
      metric: accuracy, f1 or matthews; spearman or pearson for a regression.
      log: receives the counts of the labels, and one line a learning rate.
      on_batch: called before every batch.

    Raises:
      UserError: a label of `dev` or `test` is not in `train`, or no finite number for a regression; all labels are
        equal; `train` is too small to split; or some parts have single texts, and others pairs.

    Returns:
      `report.summary` (best is the learning rate, or the penalty of a probe), metric, classes (empty for a regression),
      of the median run stderr (bootstrap over the examples), predictions and labels; and baseline, the metric of one
      label for all examples, with baseline_label.
    """
    is_regression = metric in metrics.REGRESSION
    parts, labels, classes = _prepare({"train": train, "dev": dev, "test": test}, is_regression, log)
    rows = {name: embeddings.tokenize(model, part.texts, part.pairs) for name, part in parts.items()}

    def predict(_: str, outputs: list[np.ndarray]) -> np.ndarray:
        outputs_NC = np.stack(outputs)
        return outputs_NC[:, 0] if is_regression else outputs_NC.argmax(-1)

    def score(part: str, predictions: np.ndarray) -> float:
        return metrics.evaluate(metric, labels[part], predictions, len(classes))

    if model.config.finetune.method == "probe":
        searched = _probe(model, rows, labels["train"], score, on_batch)
    else:
        num_outputs = max(len(classes), 1)
        searched = heads.fine_tune_head(model, rows, labels["train"], num_outputs, predict, score, log, on_batch)
    scores = [score("test", predictions) for predictions in searched.outcomes]
    median = searched.outcomes[report.median_run(scores)]
    names = np.array(classes) if classes else None
    constant = baseline(metric, labels, classes)
    return {
        "metric": metric,
        **report.summary(scores, searched, {name: len(part.texts) for name, part in parts.items()}, test is None),
        "stderr": metrics.stderr(metric, labels["test"], median, len(classes)),
        "baseline": constant[0],
        "baseline_label": constant[1],
        "classes": classes,
        "predictions": (median if names is None else names[median]).tolist(),
        "labels": (labels["test"] if names is None else names[labels["test"]]).tolist(),
    }


def _prepare(
    given: dict[str, tables.Labelled | None], is_regression: bool, log: Log
) -> tuple[dict[str, tables.Labelled], dict[str, np.ndarray], list[str]]:
    """Returns the parts train, dev and test, their encoded labels, and the classes (empty for a regression).

    Args:
      given: the parts; None: dev is split off train, test is dev.

    Raises:
      UserError: see `run`.
    """
    parts = {name: task_labels.stripped(part, name, log) for name, part in given.items() if part}
    for name, part in parts.items():
        if (part.pairs is None) != (parts["train"].pairs is None):
            seen, expected = ("one text", "two") if part.pairs is None else ("two texts", "one")
            raise UserError(f"--{name} has {seen} a line; expected {expected}, as --train has; see --text and --pair")
    classes = [] if is_regression else task_labels.find_classes(parts["train"])
    if "dev" not in parts:
        labels_N = [[label] for label in parts["train"].labels] if classes else []
        train, dev = (tables.take(parts["train"], i) for i in report.hold_out(len(parts["train"].texts), labels_N))
        parts = {**parts, "train": train, "dev": dev}
    encode = functools.partial(task_labels.encode, classes=classes) if classes else task_labels.to_numbers
    labels = {name: encode(part, name) for name, part in parts.items()}
    for line in task_labels.describe({name: parts[name].labels for name in parts} if classes else labels, "texts"):
        log(line)
    if "test" not in parts:
        parts["test"], labels["test"] = parts["dev"], labels["dev"]
    return parts, labels, classes


def baseline(metric: str, labels: dict[str, np.ndarray], classes: list[str]) -> tuple[float, str]:
    """Metric of one label for every example, and which one it is.

    It is the commonest label of the training set, the second class for the F1 of two, or the mean of numbers.
    """
    if classes:
        label = 1 if metric == "f1" and len(classes) == 2 else np.bincount(labels["train"]).argmax()
    else:
        label = labels["train"].mean()
    value = metrics.evaluate(metric, labels["test"], np.full_like(labels["test"], label), len(classes))
    return value, f"always '{classes[label]}'" if classes else f"always {label:.4g}"


def _probe(
    model: LoadedModel, rows: dict[str, Any], labels: np.ndarray, score: Callable[..., float], on_batch: OnBatch
) -> loop.SearchResult:
    """Fits a logistic or ridge regression to pooled states; the development set chooses its penalty."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    encoder, vectors = embeddings.make_encoder(model), {}
    for part, tokens in rows.items():
        vectors[part] = np.stack(embeddings.run_batches(model, encoder, model.params, tokens, on_batch))
    probes, dev_scores = {}, {}
    for penalty in _PENALTIES:
        on_batch()
        linear = Ridge(penalty) if labels.dtype == np.float32 else LogisticRegression(C=1 / penalty, max_iter=1000)
        probe = make_pipeline(StandardScaler(), linear).fit(vectors["train"], labels)
        probes[f"{penalty:g}"], dev_scores[f"{penalty:g}"] = probe, score("dev", probe.predict(vectors["dev"]))
    best = max(dev_scores, key=lambda name: dev_scores[name])
    return loop.SearchResult(best, dev_scores, [probes[best].predict(vectors["test"])])


def evaluate(
    model: LoadedModel, on_batch: OnBatch, train: str, dev: str, test: str, metric: str, **columns: str
) -> dict[str, Any]:
    """Runs the task on files (see `tables.read`)."""
    report.require("train", train, "a file of labelled examples to fine-tune on")
    dev_set, test_set = (tables.read(source, **columns) if source else None for source in (dev, test))
    return run(model, tables.read(train, **columns), dev_set, test_set, metric, print, on_batch)


table = report.table
