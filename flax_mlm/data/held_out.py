"""Holding out documents for validation, by a hash of their text.

A document has the same hash in every source, format and order, so copies of it are always in the same split.
"""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator

from flax_mlm.data.sources import Source, TextChunk
from flax_mlm.errors import UserError

_HASHED_BYTES = 1 << 20  # of a document; what follows does not count, so that it can be read in bounded memory
_WHITESPACE = b" \t\n\r\v\f"


def hashed(chunks: Iterable[TextChunk]) -> Iterator[TextChunk]:
    """Sets the hash of each chunk's document, a number in [0, 1): below `data.validation_fraction` it is held out.

    The hash is of the first MiB of the document in UTF-8 without ASCII whitespace.
    """
    for _, document in itertools.groupby(chunks, lambda chunk: chunk.document):
        head: list[TextChunk] = []
        content = bytearray()
        for chunk in document:
            head.append(chunk)
            content += chunk.text.encode().translate(None, _WHITESPACE)
            if len(content) >= _HASHED_BYTES:
                break
        digest = hashlib.blake2b(content[:_HASHED_BYTES], digest_size=8).digest()
        value = (int.from_bytes(digest) >> 11) / (1 << 53)  # 53 bits are exact in a float
        yield from (chunk._replace(hash=value) for chunk in itertools.chain(head, document))


def check_fraction(source: Source, fraction: float) -> None:
    """Reads a source until it has seen a training and a validation document, before any work is done on it.

    Raises:
      UserError: one of the splits would have no documents; the message has a fraction that gives documents to both.
    """
    lowest: list[float] = []  # the two lowest hashes
    highest = 0.0
    documents = 0
    for chunk in hashed(source.chunks(Counter())):
        lowest = sorted({*lowest, chunk.hash})[:2]
        highest = max(highest, chunk.hash)
        documents = chunk.document + 1
        if lowest[0] < fraction <= highest:
            return
    if not documents:
        raise UserError(f"the source, {source.name}, holds no text")
    if len(lowest) < 2:
        raise UserError(f"the source, {source.name}, is one document, so none can be held out; give it as several")
    raise UserError(
        f"data.validation_fraction is {fraction}, which holds out {'none' if lowest[0] >= fraction else 'all'} of the "
        f"{documents:,} documents of {source.name}; set it to {_between(*lowest)}"
    )


def _between(low: float, high: float) -> float:
    """Finds the shortest decimal number above `low` and not above `high`."""
    for digits in itertools.count(1):
        number = (math.floor(low * 10**digits) + 1) / 10**digits
        if low < number <= high:
            return number
    raise AssertionError
