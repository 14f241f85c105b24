"""Fine-tuning for a label, or a number, of a text or of a pair of texts (GLUE's tasks; Wang et al. 2018).

Learning rates are compared on the development set with the first seed; the best one is then used with every seed.
Where no development set is given, a tenth of the training set becomes it. The metrics are scikit-learn's and SciPy's.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flax_mlm.data.tables import Labelled
from flax_mlm.errors import UserError
from flax_mlm.evaluation import report
from flax_mlm.finetuning import loop as finetune
from flax_mlm.finetuning.loop import Log, Poll
from flax_mlm.inference.load import LoadedModel

_REGRESSION = ("spearman", "pearson")


def run(
    trained: LoadedModel,
    train: Labelled,
    dev: Labelled | None,
    test: Labelled | None,
    metric: str,
    log: Log,
    poll: Poll,
) -> dict[str, Any]:
    """Fine-tunes and evaluates on `test`, or where there is none on `dev`.

    Args:
      metric: accuracy, f1 or matthews; or for regression spearman or pearson.

    Raises:
      UserError: a label of `dev` or `test` is unknown in `train`, or no number for a regression; or there is nothing to
        learn, or to develop with.

    Returns:
      `report.summary` (chosen is the learning rate, or the penalty of a probe), metric, classes (none for a
      regression), and of the median run stderr (bootstrap over the examples), predictions and labels.
    """
    config, is_number = trained.config.finetune, metric in _REGRESSION
    if dev is None:
        labels_N = [] if is_number else [[label] for label in train.labels]
        train, dev = map(train.take, report.tenth(len(train.texts), labels_N))
    classes = [] if is_number else sorted(set(train.labels))
    if not is_number and len(classes) < 2:
        raise UserError(f"all labels of the training set are '{classes[0]}'; there is nothing to learn")
    parts = {"train": train, "dev": dev, "test": test or dev}
    labels = {name: _labels(part, classes, name) for name, part in parts.items()}
    texts = {name: finetune.tokenised(trained, part.texts, part.pairs) for name, part in parts.items()}

    def dev_score(outputs: list[np.ndarray]) -> float:
        return evaluate(metric, labels["dev"], predictions(outputs, is_number), len(classes))

    if config.method == "probe":
        function = finetune.make_vectors(trained)
        vectors = {
            name: np.stack(finetune.predict(trained, function, trained.params, some, poll))
            for name, some in texts.items()
        }
        found = _probe(vectors, labels, is_number, dev_score, poll)
    else:
        head = finetune.make_head(trained, max(len(classes), 1), per_token=False, regression=is_number)

        def epoch(rng: np.random.Generator) -> Iterator[finetune.Batch]:
            lengths = [len(tokens) for tokens in texts["train"].tokens]
            for numbers in finetune.epoch_batches(lengths, config.batch_size, rng):
                yield *finetune.padded(trained, texts["train"].take(numbers)), labels["train"][numbers]

        def ask(params: finetune.Params, name: str) -> list[np.ndarray]:
            return finetune.predict(trained, head.outputs, params, texts[name], poll)

        def once(rate: float, seed: int) -> tuple[float, list[np.ndarray]]:
            steps = finetune.batches_of(len(train.texts), config.batch_size)
            best = finetune.fit(
                trained, head.trainer, epoch, steps, lambda params: dev_score(ask(params, "dev")), rate, seed, poll
            )
            return best.score, ask(best.params, "test")

        found = finetune.search(config, once, log)
    answers = [predictions(outputs, is_number) for outputs in found.outcomes]
    scores = [evaluate(metric, labels["test"], answer, len(classes)) for answer in answers]
    middle = answers[report.median_run(scores)]
    names = np.array(classes) if classes else None
    return {
        "metric": metric,
        **report.summary(scores, found, {name: len(part.texts) for name, part in parts.items()}, test is None),
        "stderr": stderr(metric, labels["test"], middle, len(classes)),
        "classes": classes,
        "predictions": (middle if names is None else names[middle]).tolist(),
        "labels": (labels["test"] if names is None else names[labels["test"]]).tolist(),
    }


def _labels(part: Labelled, classes: list[str], name: str) -> np.ndarray:
    if not classes:
        return numbers(part, name)
    ids = {label: i for i, label in enumerate(classes)}
    if unknown := sorted(set(part.labels) - ids.keys()):
        known = ", ".join(classes[:8])
        raise UserError(f"--{name}: label '{unknown[0]}' is not among those of the training set: {known}")
    return np.array([ids[label] for label in part.labels], np.int32)


def numbers(part: Labelled, name: str) -> np.ndarray:
    """The labels as float32. Raises UserError, which calls the part by its name."""
    try:
        return np.array([float(label) for label in part.labels], np.float32)
    except ValueError as e:
        raise UserError(f"--{name}: a label is not a number ({e}); regression needs numbers") from e


def predictions(outputs: list[np.ndarray], is_number: bool) -> np.ndarray:
    """Class numbers, or numbers."""
    stacked = np.stack(outputs)
    return stacked[:, 0] if is_number else stacked.argmax(-1)


def evaluate(metric: str, labels: np.ndarray, found: np.ndarray, num_classes: int = 0) -> float:
    """The metric, one of those of `run`. F1 is that of the second of two classes, or the mean over those that occur
    when there are more; a correlation that is not defined (all alike) is 0."""
    import scipy.stats
    import sklearn.metrics

    with warnings.catch_warnings(action="ignore"):  # of draws of the bootstrap that hold one label alone
        if metric in _REGRESSION:
            correlation = scipy.stats.spearmanr if metric == "spearman" else scipy.stats.pearsonr
            return float(np.nan_to_num(correlation(labels, found).statistic))
        if metric == "f1":
            average = "binary" if num_classes == 2 else "macro"
            return float(sklearn.metrics.f1_score(labels, found, average=average, zero_division=0.0))
        function = {"accuracy": sklearn.metrics.accuracy_score, "matthews": sklearn.metrics.matthews_corrcoef}[metric]
        return float(function(labels, found))


def stderr(metric: str, labels: np.ndarray, found: np.ndarray, num_classes: int = 0) -> float:
    """Of `evaluate`, over the examples."""
    return report.bootstrap_stderr(lambda i: evaluate(metric, labels[i], found[i], num_classes), len(labels))


def _probe(
    vectors: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    is_number: bool,
    dev_score: Callable[[list[np.ndarray]], float],
    poll: Poll,
) -> finetune.Searched:
    """Logistic or ridge regression on the pooled states, the strength of whose penalty is chosen on `dev`."""
    import sklearn.linear_model
    import sklearn.pipeline
    import sklearn.preprocessing

    def outputs(model: Any, x_ND: np.ndarray) -> list[np.ndarray]:
        if is_number:
            return list(model.predict(x_ND)[:, None])
        return list(np.eye(labels["train"].max() + 1)[model.predict(x_ND)])

    models, dev_scores = {}, {}
    for strength in (0.01, 0.1, 1.0, 10.0, 100.0):
        poll()
        linear = (
            sklearn.linear_model.Ridge(strength)
            if is_number
            else sklearn.linear_model.LogisticRegression(C=1 / strength, max_iter=1000)
        )
        model = sklearn.pipeline.make_pipeline(sklearn.preprocessing.StandardScaler(), linear)
        models[f"{strength:g}"] = model.fit(vectors["train"], labels["train"])
        dev_scores[f"{strength:g}"] = dev_score(outputs(model, vectors["dev"]))
    best = max(dev_scores, key=lambda name: dev_scores[name])
    return finetune.Searched(best, dev_scores, [outputs(models[best], vectors["test"])])
