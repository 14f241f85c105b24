"""Checks that some documents are held out, and some are not."""

import itertools
import math
from collections import Counter

from flax_mlm.data.sources.base import Source
from flax_mlm.data.sources.columns import lost
from flax_mlm.errors import UserError


def check_fraction(source: Source, fraction: float) -> None:
    """Reads a source until it has seen a training and a validation document, before any work is done on it.

    Raises:
      UserError: one of the splits would have no documents; the message has a fraction that gives documents to both.
    """
    lowest: list[float] = []  # the two lowest hashes
    highest = 0.0
    documents, last = 0, None
    counts: Counter[str] = Counter()
    for chunk in source.chunks(counts):
        lowest = sorted({*lowest, chunk.hash})[:2]
        highest = max(highest, chunk.hash)
        documents += last != (last := chunk[:2])
        if lowest[0] < fraction <= highest:
            return
    if not documents:
        empty = [f"{counts['empty_documents']:,} documents are empty"] * bool(counts["empty_documents"])
        raise UserError("; ".join([f"the source, {source.name}, holds no text", *lost(counts), *empty]))
    if len(lowest) < 2:
        what = "one document" if documents == 1 else f"{documents:,} copies of one document"
        rule = " (a blank line ends a document; lines:GLOB takes each line as one)" * source.name.startswith("text:")
        raise UserError(
            f"the source, {source.name}, is {what}, so none can be held out; give several that differ{rule}"
        )
    what = f"holds out {'none' if lowest[0] >= fraction else 'all'} of the {documents:,} documents of {source.name}"
    raise UserError(f"data.validation_fraction is {fraction}, which {what}; set it to {_between(*lowest)}")


def _between(low: float, high: float) -> float:
    """Finds the shortest decimal number above `low` and not above `high`."""
    numbers = ((math.floor(low * 10**digits) + 1) / 10**digits for digits in itertools.count(1))
    return next(number for number in numbers if low < number <= high)
