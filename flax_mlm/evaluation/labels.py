"""Labels before fine-tuning: stripped of spaces, counted, and encoded as class indices or numbers."""

import contextlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from flax_mlm.data import tables
from flax_mlm.errors import UserError, did_you_mean
from flax_mlm.inference.load import Log

_SHOWN = 20  # classes, with their counts
_LIST = re.compile(r"\[.*\]|\(.*,.*\)|\{.*\}", re.DOTALL)  # as Python and JSON write lists, tuples and objects
_NO_LABEL = ("-", "?", "na", "n/a", "#n/a", "<na>", "nat", "none", "null", "unlabeled", "unlabelled")  # of SNLI, pandas
_NOT_FINITE = re.compile(r"[-+]?(nan|inf|infinity)", re.IGNORECASE)


def stripped(part: tables.Labelled, name: str, log: Log) -> tables.Labelled:
    """Strips spaces around labels, and logs how many had some."""
    if has_sets(part):  # stripped when they are read
        return part
    labels = [label.strip() for label in part.labels]
    changed = [before for before, after in zip(part.labels, labels, strict=True) if before != after]
    if changed:
        log(
            f"note: --{name}: {len(changed):,} labels had spaces around them, such as '{changed[0]}'; they are stripped"
        )
    return part._replace(labels=labels)


def has_sets(part: tables.Labelled) -> bool:
    """Returns whether a text has any number of labels."""
    return bool(part.labels) and isinstance(part.labels[0], tuple)


def encode_sets(part: tables.Labelled, name: str, classes: Sequence[str]) -> np.ndarray:
    """Converts sets of labels to float32 (N, C), 0 or 1. Raises UserError: a label is not among the classes."""
    ids = {label: i for i, label in enumerate(classes)}
    array_NC = np.zeros((len(part.labels), len(classes)), np.float32)
    for i, labels in enumerate(part.labels):
        for label in labels:
            if label not in ids:
                what = f"--{name}: {part.location(i)} has label '{label}', which is not in the training set"
                raise UserError(f"{what}; {did_you_mean(label, [*classes], f'it has {shortened([*classes])}')}")
            array_NC[i, ids[label]] = 1
    return array_NC


def find_set_classes(train: tables.Labelled) -> list[str]:
    """Returns the sorted labels that texts have in a training set. Raises UserError: there are fewer than two."""
    classes = sorted({label for labels in train.labels for label in labels})
    if len(classes) < 2:
        what = f"--train has {len(classes)} labels in all; several labels a text need at least two"
        raise UserError(f"{what}; see --label and --label_separator, or use --metric=accuracy or f1")
    return classes


def class_weights(setting: str, labels: np.ndarray, classes: Sequence[str]) -> np.ndarray | None:
    """Returns the weight of each class in the loss, float32 (C,), by `finetune.class_weights`; None: all alike.

    `balanced` is N / (C × count), as scikit-learn has it; of several labels a text, the negatives per positive.

    Args:
      labels: class indices (N,), or 0 and 1 (N, C).

    Raises:
      UserError: the setting is neither `balanced` nor `label=weight,...` with labels of the training set.
    """
    if not setting:
        return None
    if setting == "balanced":
        if labels.ndim == 2:
            count_C = labels.sum(0)
            return np.clip((len(labels) - count_C) / np.maximum(count_C, 1), 1e-3, 1e3).astype(np.float32)
        count_C = np.bincount(labels, minlength=len(classes))
        return (len(labels) / (len(classes) * np.maximum(count_C, 1))).astype(np.float32)
    weights = dict.fromkeys(classes, 1.0)
    for item in setting.split(","):
        label, _, number = item.rpartition("=")
        label, weight = label.strip(), _number(number.strip())
        if label not in weights or not weight > 0:
            expected = f"balanced, or label=weight with a label of {shortened([*classes])} and a positive number"
            raise UserError(f"finetune.class_weights has '{item.strip()}'; expected {expected}")
        weights[label] = weight
    return np.array([weights[label] for label in classes], np.float32)


def encode(part: tables.Labelled, name: str, classes: list[str]) -> np.ndarray:
    """Converts labels to class indices, int32 (N,).

    Raises:
      UserError: a label is not among the classes; the message names the flag `name`, and the line.
    """
    ids = {label: i for i, label in enumerate(classes)}
    for i, label in enumerate(part.labels):
        if label not in ids:
            what = f"--{name}: {part.location(i)} has label '{label}', which is not in the training set"
            raise UserError(f"{what}; {did_you_mean(label, classes, f'it has {shortened(classes)}')}")
    return np.array([ids[label] for label in part.labels], np.int32)


def find_classes(train: tables.Labelled) -> list[str]:
    """Returns the sorted classes of a training set.

    Raises:
      UserError: a label is NaN, infinite or several labels at once, or all are equal.
    """
    classes = set(train.labels)
    for i, label in enumerate(train.labels):
        what = f"--train: {train.location(i)} has label '{label}', which is"
        if _NOT_FINITE.fullmatch(label):
            raise UserError(f"{what} no class; correct or delete the line, or spell the class otherwise")
        several = [part.strip() for part in re.split("[,;|]", label)]
        if _LIST.fullmatch(label) or (len(several) > 1 and classes.issuperset(several)):
            raise UserError(f"{what} a list of labels; expected one label a text")
    if len(classes) == 1:
        raise UserError(f"--train: all labels are '{train.labels[0]}'; classification needs at least two")
    return sorted(classes)


def to_numbers(part: tables.Labelled, name: str) -> np.ndarray:
    """Converts labels to float32 (N,). Raises UserError: a label is no finite number, or all are equal."""
    for i, label in enumerate(part.labels):
        if not math.isfinite(_number(label)):
            raise UserError(
                f"--{name}: {part.location(i)} has label '{label}', not a number; correlations need numbers"
            )
    numbers_N = np.array([_number(label) for label in part.labels], np.float32)
    if len(set(numbers_N)) < 2:
        raise UserError(
            f"--{name}: all labels are {numbers_N[0]:g}; a correlation needs at least two different numbers"
        )
    return numbers_N


def _number(label: str) -> float:
    """The number that a label spells, or NaN where it spells none that float32 can hold."""
    number = math.nan
    with contextlib.suppress(ValueError):
        number = float(label.replace("_", "?"))  # Python would read 1_5 as 15
    return number if abs(number) < float(np.finfo(np.float32).max) else math.nan


def describe(parts: Mapping[str, Iterable[str] | np.ndarray], unit: str) -> Iterator[str]:
    """Yields a line with the counts of the labels of each part, and warnings.

    They name labels that often stand for a missing one, and groups of labels that are alike.

    Args:
      parts: labels of each part, or numbers.
      unit: what one label belongs to, in the plural.
    """
    alike: defaultdict[str, set[str]] = defaultdict(set)
    for name, labels in parts.items():
        if isinstance(labels, np.ndarray):
            low, mean, high = labels.min(), labels.mean(), labels.max()
            yield f"{name:5}  {len(labels):,} {unit}: {low:g} to {high:g}, mean {mean:.4g}"
            continue
        counts = Counter(labels)
        shown = shortened([f"{label}: {n:,}" for label, n in counts.most_common()])
        yield f"{name:5}  {counts.total():,} {unit}: {shown}"
        for label, n in counts.items():
            alike[_key(label)].add(label)
            if label.lower() in _NO_LABEL:
                what = f"--{name}: '{label}' ({n:,} {unit}) often stands for a missing label"
                yield f"WARNING: {what}; delete these lines where it does"
    for group in alike.values():
        if len(group) > 1:
            spelt = ", ".join(f"'{label}'" for label in sorted(group))
            yield f"WARNING: {spelt} are different labels; spell them alike if they mean the same"


def _key(label: str) -> str:
    """Reduces a label to what case, spaces, invisible characters, and 1 or 1.0 for a number do not change."""
    visible = (c for c in unicodedata.normalize("NFKC", label).casefold() if unicodedata.category(c)[0] not in "CZ")
    key = "".join(visible)
    number = _number(key)
    return key if math.isnan(number) else str(number)


def shortened(items: list[str]) -> str:
    """Joins items with commas, at most 20 of them."""
    more = f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
