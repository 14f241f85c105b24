"""Fine-tuning for a label or number of a text or of a pair of texts, as in GLUE (Wang et al. 2018).

Learning rates are compared on the development set with the first seed; the best one is then used with every seed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from flax_mlm.data import tables
from flax_mlm.errors import UserError
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
      log: receives one line a learning rate.
      on_batch: called before every batch.

    Raises:
      UserError: a label of `dev` or `test` is not in `train`, or no number for a regression; all labels are equal; or
        `train` is too small to split.

    Returns:
      `report.summary` (best is the learning rate, or the penalty of a probe), metric, classes (empty for a regression),
      and of the median run stderr (bootstrap over the examples), predictions and labels.
    """
    is_regression = metric in metrics.REGRESSION
    if dev is None:
        labels_N = [] if is_regression else [[label] for label in train.labels]
        train, dev = (tables.take(train, i) for i in report.hold_out(len(train.texts), labels_N))
    classes = [] if is_regression else sorted(set(train.labels))
    if len(classes) == 1:
        raise UserError(f"all labels of the training set are '{classes[0]}'; classification needs at least two")
    parts = {"train": train, "dev": dev, "test": test or dev}
    labels = {name: encode_labels(part, name, classes) for name, part in parts.items()}
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
    return {
        "metric": metric,
        **report.summary(scores, searched, {name: len(part.texts) for name, part in parts.items()}, test is None),
        "stderr": metrics.stderr(metric, labels["test"], median, len(classes)),
        "classes": classes,
        "predictions": (median if names is None else names[median]).tolist(),
        "labels": (labels["test"] if names is None else names[labels["test"]]).tolist(),
    }


def encode_labels(part: tables.Labelled, name: str, classes: list[str]) -> np.ndarray:
    """Converts labels to class indices, int32 (N,), or to numbers, float32 (N,), where there are no classes.

    Raises:
      UserError: a label is not among the classes, or is no number; the message names the flag `name`.
    """
    if not classes:
        try:
            return np.array([float(label) for label in part.labels], np.float32)
        except ValueError as e:
            raise UserError(f"--{name}: a label is not a number ({e}); regression needs numbers") from e
    ids = {label: i for i, label in enumerate(classes)}
    if unknown := sorted(set(part.labels) - ids.keys()):
        known = ", ".join(classes[:8])
        raise UserError(f"--{name}: label '{unknown[0]}' is not in the training set, which has {known}")
    return np.array([ids[label] for label in part.labels], np.int32)


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
