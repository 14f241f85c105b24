"""Fine-tuning for a label or number of a text or of a pair of texts, as in GLUE (Wang et al. 2018).

Learning rates are compared on the development set with the first seed; the best one is then used with every seed.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.data.tables import Labelled, take
from flax_mlm.errors import UserError
from flax_mlm.evaluation import dev_split, metrics, report
from flax_mlm.finetuning.batches import Batch, epoch_indices, num_batches
from flax_mlm.finetuning.heads import make_head
from flax_mlm.finetuning.loop import Log, Problem, SearchResult, search
from flax_mlm.inference import embeddings
from flax_mlm.inference.embeddings import OnBatch, Params, TokenizedTexts
from flax_mlm.inference.model import LoadedModel

_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)

Score = Callable[[list[np.ndarray]], float]  # outputs for the development set -> metric


class _Examples(NamedTuple):
    """One part of the data: N texts, and labels int32 (N,), or float32 (N,) for a regression."""

    texts: TokenizedTexts
    labels: np.ndarray


def run(
    model: LoadedModel,
    train: Labelled,
    dev: Labelled | None = None,
    test: Labelled | None = None,
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
        train, dev = (take(train, i) for i in dev_split.hold_out(len(train.texts), labels_N))
    classes = [] if is_regression else sorted(set(train.labels))
    if len(classes) == 1:
        raise UserError(f"all labels of the training set are '{classes[0]}'; classification needs at least two")
    parts = {"train": train, "dev": dev, "test": test or dev}
    labels = {name: _encode_labels(part, classes, name) for name, part in parts.items()}
    tokenized = {name: embeddings.tokenize(model, part.texts, part.pairs) for name, part in parts.items()}
    examples = {name: _Examples(tokenized[name], labels[name]) for name in parts}

    def dev_score(outputs: list[np.ndarray]) -> float:
        return metrics.evaluate(metric, labels["dev"], predict(outputs, is_regression), len(classes))

    if model.config.finetune.method == "probe":
        searched = _probe(model, examples, is_regression, dev_score, on_batch)
    else:
        searched = _fine_tune(model, examples, len(classes), dev_score, log, on_batch)
    predictions = [predict(outputs, is_regression) for outputs in searched.outcomes]
    scores = [metrics.evaluate(metric, labels["test"], one, len(classes)) for one in predictions]
    median = predictions[report.median_run(scores)]
    names = np.array(classes) if classes else None
    return {
        "metric": metric,
        **report.summary(scores, searched, {name: len(part.texts) for name, part in parts.items()}, test is None),
        "stderr": metrics.stderr(metric, labels["test"], median, len(classes)),
        "classes": classes,
        "predictions": (median if names is None else names[median]).tolist(),
        "labels": (labels["test"] if names is None else names[labels["test"]]).tolist(),
    }


def _encode_labels(part: Labelled, classes: list[str], name: str) -> np.ndarray:
    if not classes:
        return numbers(part, name)
    ids = {label: i for i, label in enumerate(classes)}
    if unknown := sorted(set(part.labels) - ids.keys()):
        known = ", ".join(classes[:8])
        raise UserError(f"--{name}: label '{unknown[0]}' is not in the training set, which has {known}")
    return np.array([ids[label] for label in part.labels], np.int32)


def numbers(part: Labelled, name: str) -> np.ndarray:
    """Converts labels to float32 (N,). Raises UserError, which names the flag `name`."""
    try:
        return np.array([float(label) for label in part.labels], np.float32)
    except ValueError as e:
        raise UserError(f"--{name}: a label is not a number ({e}); regression needs numbers") from e


def predict(outputs: list[np.ndarray], is_regression: bool) -> np.ndarray:
    """Converts outputs (N, C) to class indices (N,), or to numbers (N,)."""
    stacked_NC = np.stack(outputs)
    return stacked_NC[:, 0] if is_regression else stacked_NC.argmax(-1)


def _fine_tune(
    model: LoadedModel,
    examples: dict[str, _Examples],
    num_classes: int,
    dev_score: Score,
    log: Log,
    on_batch: OnBatch,
) -> SearchResult:
    """Fine-tunes encoder and head; the outcome of a seed is the outputs for the test set."""
    batch_size, train = model.config.finetune.batch_size, examples["train"]
    head = make_head(model, max(num_classes, 1), regression=num_classes == 0)

    def epoch(rng: np.random.Generator) -> Iterator[Batch]:
        for indices in epoch_indices([len(tokens) for tokens in train.texts.tokens], batch_size, rng):
            yield *embeddings.pad(model, take(train.texts, indices)), train.labels[indices]

    def outputs(params: Params, name: str) -> list[np.ndarray]:
        return embeddings.run_batches(model, head.outputs, params, examples[name].texts, on_batch)

    problem = Problem(
        head.init,
        head.loss,
        epoch,
        steps_per_epoch=num_batches(len(train.labels), batch_size),
        dev_score=lambda params: dev_score(outputs(params, "dev")),
    )
    return search(model, problem, lambda params: outputs(params, "test"), log, on_batch)


def _probe(
    model: LoadedModel, examples: dict[str, _Examples], is_regression: bool, dev_score: Score, on_batch: OnBatch
) -> SearchResult:
    """Fits a logistic or ridge regression to pooled states; the development set chooses its penalty."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    encoder = embeddings.make_encoder(model)
    vectors = {
        name: np.stack(embeddings.run_batches(model, encoder, model.params, part.texts, on_batch))
        for name, part in examples.items()
    }
    labels = examples["train"].labels

    def outputs(fitted: Any, x_ND: np.ndarray) -> list[np.ndarray]:
        predictions = fitted.predict(x_ND)
        return list(predictions[:, None] if is_regression else np.eye(labels.max() + 1)[predictions])

    probes, dev_scores = {}, {}
    for penalty in _PENALTIES:
        on_batch()
        linear = Ridge(penalty) if is_regression else LogisticRegression(C=1 / penalty, max_iter=1000)
        probe = make_pipeline(StandardScaler(), linear).fit(vectors["train"], labels)
        probes[f"{penalty:g}"] = probe
        dev_scores[f"{penalty:g}"] = dev_score(outputs(probe, vectors["dev"]))
    best = max(dev_scores, key=lambda name: dev_scores[name])
    return SearchResult(best, dev_scores, [outputs(probes[best], vectors["test"])])
