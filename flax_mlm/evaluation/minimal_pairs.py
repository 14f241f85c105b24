"""Minimal pairs: whether the acceptable sentence of a pair is likelier than the unacceptable one.

Files as in BLiMP (Warstadt et al. 2020, arXiv:1912.00582): a JSON object a line, with `sentence_good` and
`sentence_bad`, and `UID` for the paradigm (else the file's name).
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from flax_mlm.data import tables
from flax_mlm.errors import UserError
from flax_mlm.evaluation import report
from flax_mlm.inference import likelihood
from flax_mlm.inference.load import LoadedModel, OnBatch

Pair = tuple[str, str]  # good sentence, bad sentence


def read(path: str) -> dict[str, list[Pair]]:
    """Reads paradigm -> pairs from a .jsonl file, from all in a folder, or from `tfds:blimp/NAME`.

    Raises:
      UserError: there is no file, or a line is not a pair; the message names it.
    """
    file = Path(path).expanduser()
    sources = sorted(map(str, file.glob("*.jsonl"))) if file.is_dir() else [path]
    if not sources or not (file.is_dir() or file.is_file() or path.startswith("tfds:")):
        raise UserError(f"--data is '{path}'; expected a .jsonl file or a folder of .jsonl files")
    pairs: dict[str, list[Pair]] = {}
    for source in sources:
        for location, record in tables.records(source):
            good, bad = record.get("sentence_good"), record.get("sentence_bad")
            if not (isinstance(good, str) and isinstance(bad, str) and good.strip() and bad.strip()):
                raise UserError(f"--data: {location} is not a pair; expected texts sentence_good and sentence_bad")
            pairs.setdefault(str(record.get("UID") or Path(source).stem), []).append((good, bad))
    return pairs


def run(
    model: LoadedModel, pairs: dict[str, list[Pair]], variant: str = "within_word_l2r", on_batch: OnBatch = lambda: None
) -> dict[str, Any]:
    """Computes the fraction of pairs whose good sentence has the higher log-likelihood; a tie counts one half.

    Args:
      pairs: paradigm -> pairs.
      variant: see `likelihood.log_likelihood`.
      on_batch: called before every batch.

    Returns:
      accuracy and accuracy_stderr (over pairs), pairs; and `paradigms`, name -> the same three, and `each`, which is
      0, 0.5 or 1 for a pair.
    """
    results: dict[str, Any] = {}
    for name, some in pairs.items():
        texts = [text for pair in some for text in pair]
        good, bad = likelihood.log_likelihood(model, texts, variant, on_batch).reshape(-1, 2).T
        right = (good > bad) + 0.5 * (good == bad)
        results[name] = {**_summary(right), "each": right.tolist()}
    correct = np.concatenate([result["each"] for result in results.values()])
    return {**_summary(correct), "variant": variant, "paradigms": results}


def evaluate(model: LoadedModel, on_batch: OnBatch, data: str, variant: str) -> dict[str, Any]:
    """Runs the task on files (see `read`)."""
    report.require("data", data, "a .jsonl file of pairs, or a folder of such files")
    return run(model, read(data), variant, on_batch)


def _summary(right: np.ndarray) -> dict[str, float]:
    accuracy = float(right.mean())
    stderr = math.sqrt(accuracy * (1 - accuracy) / len(right))
    return {"accuracy": accuracy, "accuracy_stderr": stderr, "pairs": len(right)}


def table(result: dict[str, Any]) -> list[str]:
    """Formats a result as lines of text."""
    width = max(map(len, [*result["paradigms"], "all"]))
    rows = [*result["paradigms"].items(), ("all", result)]
    return [f"{name:{width}}  {r['accuracy']:.3f} ± {r['accuracy_stderr']:.3f}  {r['pairs']:,}" for name, r in rows]
