"""Metrics with their standard errors: of labels and tags as scikit-learn, SciPy and seqeval define them, of losses."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

REGRESSION = ("spearman", "pearson")
MULTI_LABEL = ("f1_micro", "f1_macro")  # of texts with any number of labels


def evaluate(metric: str, labels: np.ndarray, predictions: np.ndarray, num_classes: int = 0) -> float:
    """Computes accuracy, f1, matthews, spearman or pearson, or f1_micro or f1_macro of arrays (N, C) of 0 and 1.

    With two classes f1 is that of the second class; with more it is the mean over the classes that occur. An undefined
    correlation (constant input) is 0.
    """
    import scipy.stats
    import sklearn.metrics

    with warnings.catch_warnings(action="ignore"):  # bootstrap draws may hold one class only
        if metric in REGRESSION:
            correlation = scipy.stats.spearmanr if metric == "spearman" else scipy.stats.pearsonr
            return float(np.nan_to_num(correlation(labels, predictions).statistic))
        if metric in MULTI_LABEL:
            average = metric.removeprefix("f1_")
            return float(sklearn.metrics.f1_score(labels, predictions, average=average, zero_division=0.0))
        if metric == "f1":
            average = "binary" if num_classes == 2 else "macro"
            return float(sklearn.metrics.f1_score(labels, predictions, average=average, zero_division=0.0))
        function = {"accuracy": sklearn.metrics.accuracy_score, "matthews": sklearn.metrics.matthews_corrcoef}[metric]
        return float(function(labels, predictions))


def stderr(metric: str, labels: np.ndarray, predictions: np.ndarray, num_classes: int = 0) -> float:
    """Bootstrap standard error of `evaluate` over the examples."""
    return bootstrap_stderr(lambda i: evaluate(metric, labels[i], predictions[i], num_classes), len(labels))


def bootstrap_stderr(metric: Callable[[np.ndarray], float], size: int, draws: int = 200) -> float:
    """Standard deviation of a metric over resampled test sets.

    Args:
      metric: indices of examples, with repetitions -> value.
      size: number of examples.
    """
    rng = np.random.default_rng(0)
    return float(np.std([metric(rng.integers(0, size, size)) for _ in range(draws)]))


def entity_counts(labels: list[list[str]], predictions: list[list[str]]) -> np.ndarray:
    """Counts each sentence's correct, predicted and true entities, int64 (N, 3)."""
    from seqeval.metrics.sequence_labeling import get_entities

    pairs = ((set(get_entities(a)), set(get_entities(b))) for a, b in zip(labels, predictions, strict=True))
    return np.array([(len(a & b), len(b), len(a)) for a, b in pairs], np.int64)


def entity_f1(counts_N3: np.ndarray) -> float:
    """Entity F1 of sentences, from `entity_counts`."""
    correct, predicted, true = counts_N3.sum(0)
    return float(2 * correct / max(predicted + true, 1))


def loss_and_accuracy(count_R: np.ndarray, loss_R: np.ndarray, correct_R: np.ndarray) -> dict[str, float]:
    """Computes loss and accuracy per prediction, and their standard errors over rows, from sums of each row."""
    result: dict[str, float] = {}
    total = float(count_R.sum())
    for name, sum_R in (("loss", loss_R), ("accuracy", correct_R)):
        ratio = float(sum_R.sum()) / total
        stderr = math.sqrt(np.square(sum_R - ratio * count_R).sum()) / total
        result |= {name: ratio, f"{name}_stderr": stderr}
    return result


def by_corpus(sums_3R: Sequence[np.ndarray], num_rows: dict[str, int], count_key: str) -> dict[str, float]:
    """Computes `loss/NAME`, `loss_stderr/NAME`, `accuracy/NAME`, `rows/NAME` and number of predictions of each of
    several corpora.

    Corpora without predictions have no loss and accuracy; with a single corpus there are no metrics.

    Args:
      sums_3R: number of predictions, loss, and number of correct predictions of each row, corpus by corpus, then of the
        rows that fill up the last batch.
      num_rows: of each corpus.
      count_key: name of the number of predictions.
    """
    result: dict[str, float] = {}
    parts = np.split(np.stack(sums_3R), np.cumsum(list(num_rows.values())), axis=1)[:-1]
    for name, part_3R in zip(num_rows, parts, strict=True):
        if len(num_rows) == 1:
            continue
        if part_3R[0].any():
            values = loss_and_accuracy(*part_3R)
            result |= {f"{key}/{name}": values[key] for key in ("loss", "loss_stderr", "accuracy")}
        result[f"rows/{name}"] = int((part_3R[0] > 0).sum())
        result[f"{count_key}/{name}"] = int(part_3R[0].sum())
    return result


def fertility(counts: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Computes `tokens_per_word` and `tokens_per_byte` of the held-out text, with several corpora also of each, as
    `tokens_per_word/NAME`.

    Args:
      counts: name of a corpus -> tokens, words (separated by whitespace) and bytes of its held-out documents.
    """
    result: dict[str, float] = {}
    for unit in ("word", "byte"):
        pairs = {name: (c["tokens"], c[f"{unit}s"]) for name, c in counts.items()}
        tokens, units = map(sum, zip(*pairs.values(), strict=True))
        result[f"tokens_per_{unit}"] = tokens / max(units, 1)
        if len(pairs) > 1:
            result |= {f"tokens_per_{unit}/{name}": t / max(n, 1) for name, (t, n) in pairs.items()}
    return result


def corpus_names(result: Iterable[str]) -> list[str]:
    """Names of the corpora that a result has losses of."""
    return [key.removeprefix("loss/") for key in result if key.startswith("loss/")]
