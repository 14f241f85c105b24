"""Clozes: the rank of the answer among all tokens that could fill the [MASK] of a text.

A file has lines `text with [MASK]<TAB>answer`, with several answers separated by `|`, the best of which counts.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_mlm.errors import UserError
from flax_mlm.inference.load import LoadedModel, OnBatch
from flax_mlm.inference.mask_filler import MaskFiller
from flax_mlm.storage import files

Cloze = tuple[str, tuple[str, ...]]  # text, answers

# Some have their evidence to the left of the mask, some to the right, which a causal model does not see.
BUILT_IN: tuple[Cloze, ...] = (
    ("The [MASK] sat on the mat.", ("cat", "dog")),
    ("The [MASK] barked at the mailman.", ("dog",)),
    ("The President of the United [MASK] spoke to Congress.", ("States",)),
    ("The [MASK] of the United States commands the army.", ("President", "president")),
    ("Congress must pass a [MASK] to raise the tax.", ("law", "bill")),
    ("We are at [MASK] with that nation, and our armies fight.", ("war",)),
    ("The treaty was ratified by the [MASK].", ("Senate", "senate")),
    ("He was born in the [MASK] of New York.", ("city", "State", "state")),
)


def read(path: str) -> list[Cloze]:
    """Reads the clozes of a file, or returns the built-in ones where the path is empty.

    Raises:
      UserError: the file cannot be read, or a line is not a cloze; the message names it.
    """
    if not path:
        return list(BUILT_IN)
    file = Path(path).expanduser()
    clozes = []
    for number, line in enumerate(files.read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        text, _, answers = line.partition("\t")
        words = tuple(word.strip() for word in answers.split("|") if word.strip())
        if text.count("[MASK]") != 1 or not words:
            raise UserError(f"--data: {file}:{number} is not a text with one [MASK], a tab, and an answer")
        clozes.append((text, words))
    if not clozes:
        raise UserError(f"--data: {file} has no clozes")
    return clozes


def fitting(model: LoadedModel, clozes: Sequence[Cloze]) -> list[Cloze]:
    """Selects clozes that fit into a row with every answer."""

    def length(cloze: Cloze) -> int:
        text, answers = cloze
        encode = model.tokenizer.encode_answer
        return len(model.tokenizer.encode_with_mask(text)) + 1 + max(len(encode(answer, text)) for answer in answers)

    return [cloze for cloze in clozes if length(cloze) <= model.row_length]


def run(model: LoadedModel, clozes: Sequence[Cloze] = BUILT_IN, on_batch: OnBatch = lambda: None) -> dict[str, Any]:
    """Ranks the answers of clozes among all tokens of the vocabulary.

    An answer of several tokens gets as many masks, which are filled from left to right; its rank is that of its first
    token. Ties count against the answer, so that equal probabilities are no knowledge.

    Args:
      on_batch: called before every cloze.

    Returns:
      top1, top5 (fractions of the clozes), mean_reciprocal_rank, log_probability (mean over the answers, nats), clozes
      (their number), and `answers`: for each cloze text, answer, probability, rank (from 1) and `own`, the five words
      that are likeliest to the model.
    """
    filler = MaskFiller(model)
    answers: list[dict[str, Any]] = []
    for text, words in clozes:
        on_batch()
        if empty := [word for word in words if not model.tokenizer.encode_answer(word, text)]:
            raise UserError(f"--data: the answer {empty[0]!r} to {text!r} becomes no token; leave it out")
        best, probability = filler.rank_words(text, list(words))[0]
        (log_probs_V,) = filler.log_probabilities([filler.encode(text)])[0].values()
        first = model.tokenizer.encode_answer(best, text)[0]
        rank = int((log_probs_V >= log_probs_V[first]).sum())
        own = [word for word, _ in filler.top_words(text, 5)[0]]
        answers.append({"text": text, "answer": best, "probability": probability, "rank": rank, "own": own})
    ranks = np.array([answer["rank"] for answer in answers])
    return {
        "top1": float((ranks == 1).mean()),
        "top5": float((ranks <= 5).mean()),
        "mean_reciprocal_rank": float((1 / ranks).mean()),
        "log_probability": float(np.mean([math.log(max(a["probability"], 1e-300)) for a in answers])),
        "clozes": len(answers),
        "answers": answers,
    }


def evaluate(model: LoadedModel, on_batch: OnBatch, data: str) -> dict[str, Any]:
    """Runs the task on the clozes of a file (see `read`)."""
    return run(model, read(data), on_batch)


def table(result: dict[str, Any]) -> list[str]:
    """Formats a result as lines of text."""
    lines = [
        f"{a['text']}\n    {a['answer']}: rank {a['rank']:,}, probability {a['probability']:.4f}; {', '.join(a['own'])}"
        for a in result["answers"]
    ]
    ranks = f"rank 1: {result['top1']:.0%}  rank 1 to 5: {result['top5']:.0%}"
    mean = f"mean reciprocal rank {result['mean_reciprocal_rank']:.3f}"
    return [*lines, f"{ranks}  {mean}  over {result['clozes']} clozes"]
