"""Which of two sentences that differ in one point does the model find likelier, the good one or the bad one?

Files as in BLiMP (Warstadt et al. 2020, arXiv:1912.00582): a JSON object a line, with `sentence_good` and
`sentence_bad`, and `UID` for the paradigm (else the file's name).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flax_mlm.data import tables as labelled
from flax_mlm.errors import UserError
from flax_mlm.inference import likelihood
from flax_mlm.inference.load import LoadedModel

Pair = tuple[str, str]  # good, bad


def read(path: str) -> dict[str, list[Pair]]:
    """Paradigm -> pairs, of a .jsonl file, of all in a folder, or of `tfds:blimp/NAME`.

    Raises:
      UserError: there is none, or a line is not one; the message names it.
    """
    where = Path(path).expanduser()
    found = sorted(map(str, where.glob("*.jsonl"))) if where.is_dir() else [path]
    if not found or not (where.is_dir() or where.is_file() or path.startswith("tfds:")):
        raise UserError(f"--data: '{path}' is no .jsonl file and no folder of such")
    pairs: dict[str, list[Pair]] = {}
    for source in found:
        for line, record in labelled.records(source):
            good, bad = record.get("sentence_good"), record.get("sentence_bad")
            if not (isinstance(good, str) and isinstance(bad, str) and good.strip() and bad.strip()):
                raise UserError(f"--data: {line} is not a pair: it takes texts sentence_good and sentence_bad")
            pairs.setdefault(str(record.get("UID") or Path(source).stem), []).append((good, bad))
    return pairs


def run(trained: LoadedModel, pairs: dict[str, list[Pair]], variant: str, poll: Callable[[], Any]) -> dict[str, Any]:
    """Accuracy: the share of the pairs whose good sentence has the higher log-likelihood (a tie is half right).

    Args:
      variant: see `likelihood.of_texts`.
      poll: called before every batch.

    Returns:
      accuracy and accuracy_stderr (over pairs), pairs; and `paradigms`: name -> the same three, and `each` pair's.
    """
    results: dict[str, Any] = {}
    correct = []
    for name, some in pairs.items():
        texts = [text for pair in some for text in pair]
        good, bad = likelihood.of_texts(trained, texts, variant, poll).reshape(-1, 2).T
        right = (good > bad) + 0.5 * (good == bad)
        results[name] = {**_summary(right), "each": right.tolist()}
        correct.append(right)
    return {**_summary(np.concatenate(correct)), "variant": variant, "paradigms": results}


def _summary(right: np.ndarray) -> dict[str, float]:
    accuracy = float(right.mean())
    return {
        "accuracy": accuracy,
        "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / len(right)),
        "pairs": len(right),
    }


def table(result: dict[str, Any]) -> list[str]:
    """The result as lines for a person."""
    width = max(map(len, [*result["paradigms"], "all"]))
    rows = [*result["paradigms"].items(), ("all", result)]
    return [f"{name:{width}}  {r['accuracy']:.3f} ± {r['accuracy_stderr']:.3f}  {r['pairs']:,}" for name, r in rows]
