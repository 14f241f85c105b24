"""Sentences with a hole, and what belongs there: how high does the model rank it?

A file of lines `text with [MASK]<TAB>answer` (several answers with `|` between: the best one counts).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_mlm.errors import UserError
from flax_mlm.inference.load import LoadedModel
from flax_mlm.inference.mask_filler import MaskFiller
from flax_mlm.storage import files

Cloze = tuple[str, tuple[str, ...]]  # text, answers

# Some have their evidence on the left, some on the right, where a causal model does not look.
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
    """The clozes of a file; the built-in ones without one.

    Raises:
      UserError: it cannot be read, or a line is not one; the message names it.
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
        raise UserError(f"--data: {file} holds no clozes")
    return clozes


def fitting(trained: LoadedModel, clozes: Sequence[Cloze]) -> list[Cloze]:
    """Those that the model takes, whichever answer is put in."""
    t, limit = trained.tokenizer, trained.row_length

    def length(cloze: Cloze) -> int:
        text, answers = cloze
        return len(t.encode_with_mask(text)) + 1 + max(len(t.encode_answer(answer, text)) for answer in answers)

    return [cloze for cloze in clozes if length(cloze) <= limit]


def run(trained: LoadedModel, clozes: list[Cloze], poll: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """Where the answers stand among all pieces of the vocabulary.

    An answer of several pieces is given as many masks, filled from left to right; its rank is that of its first piece.

    Args:
      poll: called before every cloze.

    Returns:
      top1, top5 (shares of the clozes), mean_reciprocal_rank, log_probability (mean of the answers', nats), clozes,
      and `answers`: for each cloze text, answer, probability, rank (from 1) and the model's own five words.
    """
    filler = MaskFiller(trained)
    answers: list[dict[str, Any]] = []
    for text, words in clozes:
        poll()
        best, probability = filler.targets(text, list(words))[0]
        ids = filler.ids(text)
        first = trained.tokenizer.encode_answer(best, text)[0]
        (scores_V,) = filler.log_probabilities([ids])[0].values()
        rank = int((scores_V > scores_V[first]).sum()) + 1
        own = [word for word, _ in filler.top(text, 5)[0]]
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


def table(result: dict[str, Any]) -> list[str]:
    """The result as lines for a person."""
    lines = [
        f"{a['text']}\n    {a['answer']}: rank {a['rank']:,}, probability {a['probability']:.4f}; {', '.join(a['own'])}"
        for a in result["answers"]
    ]
    return [
        *lines,
        f"rank 1: {result['top1']:.0%}  rank 1 to 5: {result['top5']:.0%}  mean reciprocal rank "
        f"{result['mean_reciprocal_rank']:.3f}  over {result['clozes']} clozes",
    ]
