"""Fine-tuning for labels or a number of a text or of a pair of texts, as in GLUE (Wang et al. 2018), and evaluation of
a model that was fine-tuned before.

Learning rates are compared on the development set with the first seed; the best one is then used with every seed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flax_mlm.data import tables
from flax_mlm.errors import UserError
from flax_mlm.evaluation import labels as task_labels
from flax_mlm.evaluation import metrics, report
from flax_mlm.finetuning import heads, loop, saving
from flax_mlm.inference import classify, embeddings, task_head
from flax_mlm.inference.load import LoadedModel, Log, OnBatch, Params
from flax_mlm.inference.task_head import TaskHead

_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)

Keep = Callable[[Params, int, TaskHead], None]  # fine-tuned parameters, number of training examples, head


def run(
    model: LoadedModel,
    train: tables.Labelled,
    dev: tables.Labelled | None = None,
    test: tables.Labelled | None = None,
    metric: str = "accuracy",
    log: Log = lambda line: None,
    on_batch: OnBatch = lambda: None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Fine-tunes and evaluates on `test`, or on `dev` where there is no test set.

    Args:
      dev: chooses learning rate and epoch; None: a tenth of `train`.
      metric: accuracy, f1 or matthews; f1_micro or f1_macro of any number of labels a text; spearman or pearson for a
        regression.
      log: receives the counts of the labels, and one line a learning rate.
      on_batch: called before every batch.
      keep: called with what the seed that is best on the development set has learned.

    Raises:
      UserError: a label of `dev` or `test` is not in `train`, or no finite number for a regression; all labels are
        equal; `train` is too small to split; or some parts have single texts, and others pairs.

    Returns:
      `report.summary` (best is the learning rate, or the penalty of a probe), metric, classes (empty for a regression),
      of the median run stderr (bootstrap over the examples), predictions and labels; and baseline, the metric of one
      label for all examples, with baseline_label.
    """
    problem = problem_of(metric)
    parts, labels, classes = _prepare({"train": train, "dev": dev, "test": test}, problem, log)
    rows = {name: embeddings.tokenize(model, part.texts, part.pairs) for name, part in parts.items()}
    predict = functools.partial(to_predictions, problem)

    def score(part: str, predictions: np.ndarray) -> float:
        return metrics.evaluate(metric, labels[part], predictions, len(classes))

    if model.config.finetune.method == "probe":
        if problem == "multi_label_classification":
            raise UserError("finetune.method is probe, which has one label a text; use full for several labels")
        searched = _probe(model, rows, labels["train"], score, on_batch)
    else:
        kind, is_pair = heads.choose_kind(model, "classification"), train.pairs is not None
        head = TaskHead("classification", problem, tuple(classes), kind, is_pair, metric)
        weighting = model.config.finetune.class_weights if classes else ""
        weights_C = task_labels.class_weights(weighting, labels["train"], classes)
        arguments = rows, labels["train"], lambda _, outputs: predict(outputs), score, log, on_batch
        searched = heads.fine_tune_head(model, head, *arguments, weights_C)
        if keep:
            keep(searched.params, len(parts["train"].texts), head)
    scores = [score("test", predictions) for predictions in searched.outcomes]
    median = searched.outcomes[report.median_run(scores)]
    constant = baseline(metric, labels, classes)
    return {
        "metric": metric,
        **report.summary(scores, searched, {name: len(part.texts) for name, part in parts.items()}, test is None),
        "baseline": constant[0],
        "baseline_label": constant[1],
        **_judged(metric, problem, labels["test"], median, classes),
        **({"saved": report.saved(searched, scores)} if keep else {}),
    }


def problem_of(metric: str) -> str:
    """Returns the kind of problem that a metric is for, see `task_head.DEFAULT_METRICS`."""
    if metric in metrics.REGRESSION:
        return "regression"
    return "multi_label_classification" if metric in metrics.MULTI_LABEL else "single_label_classification"


def to_predictions(problem: str, outputs: list[np.ndarray]) -> np.ndarray:
    """Converts outputs (C,) of texts to class indices (N,), to 0 and 1 (N, C) of several labels, or to numbers (N,)."""
    outputs_NC = np.stack(outputs)
    if problem == "regression":
        return outputs_NC[:, 0]
    if problem == "multi_label_classification":
        return (outputs_NC > 0).astype(np.float32)  # probability above a half
    return outputs_NC.argmax(-1)


def _judged(
    metric: str, problem: str, labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str]
) -> dict[str, Any]:
    """Returns standard error, classes, predictions and labels of a result, by name."""
    return {
        "stderr": metrics.stderr(metric, labels, predictions, len(classes)),
        "classes": list(classes),
        "predictions": _named(problem, predictions, classes),
        "labels": _named(problem, labels, classes),
    }


def _named(problem: str, values: np.ndarray, classes: Sequence[str]) -> list[Any]:
    if problem == "multi_label_classification":
        return [[label for label, is_set in zip(classes, row, strict=True) if is_set] for row in values]
    return (np.array(classes)[values] if classes else values).tolist()


def _prepare(
    given: dict[str, tables.Labelled | None], problem: str, log: Log
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
    has_sets = problem == "multi_label_classification"
    find_classes = task_labels.find_set_classes if has_sets else task_labels.find_classes
    classes = [] if problem == "regression" else find_classes(parts["train"])
    if "dev" not in parts:
        labels_N = [label if has_sets else [label] for label in parts["train"].labels] if classes else []
        train, dev = (tables.take(parts["train"], i) for i in report.hold_out(len(parts["train"].texts), labels_N))
        parts = {**parts, "train": train, "dev": dev}
    labels = {name: _encode(part, name, classes, has_sets) for name, part in parts.items()}
    counted: dict[str, Any] = {name: _flat(part) for name, part in parts.items()} if classes else labels
    for line in task_labels.describe(counted, "labels" if has_sets else "texts"):
        log(line)
    if "test" not in parts:
        parts["test"], labels["test"] = parts["dev"], labels["dev"]
    return parts, labels, classes


def _encode(part: tables.Labelled, name: str, classes: list[str], has_sets: bool) -> np.ndarray:
    if not classes:
        return task_labels.to_numbers(part, name)
    encode = task_labels.encode_sets if has_sets else task_labels.encode
    return encode(part, name, classes)


def _flat(part: tables.Labelled) -> list[str]:
    return [label for labels in part.labels for label in labels] if task_labels.has_sets(part) else part.labels


def baseline(metric: str, labels: dict[str, np.ndarray], classes: list[str]) -> tuple[float, str]:
    """Metric of one label for every example, and which one it is.

    It is the commonest label of the training set, the second class for the F1 of two, or the mean of numbers.
    """
    constant: Any
    if metric in metrics.MULTI_LABEL:
        label = labels["train"].sum(0).argmax()
        constant = np.zeros_like(labels["test"])
        constant[:, label] = 1
    elif classes:
        label = 1 if metric == "f1" and len(classes) == 2 else np.bincount(labels["train"]).argmax()
        constant = np.full_like(labels["test"], label)
    else:
        label = labels["train"].mean()
        constant = np.full_like(labels["test"], label)
    value = metrics.evaluate(metric, labels["test"], constant, len(classes))
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


def judge(
    model: LoadedModel,
    test: tables.Labelled,
    metric: str = "",
    log: Log = lambda line: None,
    on_batch: OnBatch = lambda: None,
) -> dict[str, Any]:
    """Evaluates a model that was fine-tuned before, without training.

    Args:
      metric: as for `run`; empty: the one by which the head was chosen.
      log: receives the counts of the labels.

    Raises:
      UserError: the model has no head for texts, or one for another kind of problem; or a label is not one of its own.

    Returns:
      as `run`, without the baseline.
    """
    head = task_head.require(model.task_head, "classification")
    metric = metric or head.metric or task_head.DEFAULT_METRICS[head.problem]
    check_metric(head, metric)
    task_head.check_pairs(head, test.pairs, "test")
    classes, has_sets = list(head.labels), head.problem == "multi_label_classification"
    part = _by_number(task_labels.stripped(test, "test", log), classes, log)
    labels = _encode(part, "test", classes, has_sets)
    for line in task_labels.describe({"test": _flat(part) if classes else labels}, "labels" if has_sets else "texts"):
        log(line)
    rows = embeddings.tokenize(model, part.texts, part.pairs)
    predictions = to_predictions(head.problem, classify.run_head(model, head, rows, on_batch))
    scores = [metrics.evaluate(metric, labels, predictions, len(classes))]
    nothing_searched = loop.SearchResult("", {}, [predictions])
    summary = report.summary(scores, nothing_searched, {"test": len(part.texts)}, False)
    return {"metric": metric, **summary, **_judged(metric, head.problem, labels, predictions, classes)}


def check_metric(head: TaskHead, metric: str) -> None:
    """Raises UserError where a metric is for another kind of problem than the head's."""
    if problem_of(metric) != head.problem:
        own = head.metric or task_head.DEFAULT_METRICS[head.problem]
        what = f"--metric is {metric}, for {problem_of(metric).replace('_', ' ')}, and the checkpoint's head is for"
        raise UserError(f"{what} {head.problem.replace('_', ' ')}; use --metric={own}")


def _by_number(part: tables.Labelled, classes: list[str], log: Log) -> tables.Labelled:
    """Names labels that are written as the numbers of the head's labels, as datasets of the hub have them."""
    found, numbers = {*_flat(part)}, {str(i): label for i, label in enumerate(classes)}
    if not classes or found & {*classes} or not found <= numbers.keys():
        return part
    log(f"note: the labels of --test are numbers; they are taken for 0 = '{classes[0]}', 1 = ... as the head has them")
    if task_labels.has_sets(part):
        return part._replace(labels=[tuple(numbers[label] for label in labels) for labels in part.labels])
    return part._replace(labels=[numbers[label] for label in part.labels])


def evaluate(
    model: LoadedModel,
    on_batch: OnBatch,
    train: str,
    dev: str,
    test: str,
    metric: str,
    save: str,
    label_separator: str,
    **columns: str,
) -> dict[str, Any]:
    """Runs the task on files (see `tables.read`).

    Args:
      save: a new folder for the fine-tuned model; empty: it is not kept.
      label_separator: between the labels of a text, where the metric is for several.
    """
    folder = saving.new_folder(save, train, model.config.finetune.method)
    if not train:
        own = task_head.require(model.task_head, "classification")
        metric = metric or own.metric or task_head.DEFAULT_METRICS[own.problem]
        report.require("test", test, "labelled examples; without --train the checkpoint's own head is evaluated")
    metric = metric or "accuracy"
    separator = (label_separator or ",") if metric in metrics.MULTI_LABEL else ""

    def read(source: str) -> tables.Labelled:
        return tables.read(source, **columns, separator=separator)

    if not train:
        return judge(model, read(test), metric, print, on_batch)
    dev_set, test_set = (read(source) if source else None for source in (dev, test))
    keep = functools.partial(saving.save_model, folder, model) if folder else None
    return run(model, read(train), dev_set, test_set, metric, print, on_batch, keep)


table = report.table
