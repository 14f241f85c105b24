"""Hashes of words and of n-grams of words, computed for many documents at once.

Normalised text: Unicode NFC, lower case. A word is a run of letters, digits and combining marks; whitespace,
punctuation and symbols only separate words. Each character of a script without spaces between words (Chinese, Japanese,
Thai, ...) is a word. The end of a chunk ends a word; chunks end before whitespace, unless they are one word of 65,536
characters.

A hash follows from the text alone, on every platform: polynomials modulo 2^64, mixed by a fixed bijection. The classes
and lower case of characters are those of Python's Unicode tables.
"""

import dataclasses
import functools
import itertools
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np

from flax_mlm.data import words
from flax_mlm.data.sources.base import TextChunk

Documents: TypeAlias = Iterable[tuple[int, Iterable[str]]]  # (document number, chunks of its text)

BLOCK_CHARS = 1 << 17  # of text hashed at once: its arrays stay in a processor's cache
_CLASSES = 0x323B0  # code points above: ideographs end here, what follows counts as letters
_LETTER, _STANDS_ALONE = 1, 2
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64


@dataclasses.dataclass(frozen=True)
class WordBlock:
    """Hashes of the words of consecutive documents.

    A document of several blocks begins, in all but the first of them, with its last `carried` words of the block
    before, so that every n-gram of up to `carried` + 1 words is whole in some block.

    Attributes:
      documents: their numbers; the first may have begun in an earlier block.
      offsets: int64 (D + 1,), document d has the words offsets[d] to offsets[d + 1].
      hashes: uint64 (W,), of words.
      is_open: the last document continues in the next block.
      earlier_words: number of words that the first document has in earlier blocks, without those that are here again.
    """

    documents: list[int]
    offsets: np.ndarray
    hashes: np.ndarray
    is_open: bool
    earlier_words: int = 0

    def ngrams(self, n: int, whole_below: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Returns the hashes of all n-grams, uint64 (G,), and int64 (D + 1,) with where those of a document begin.

        Args:
          n: words of an n-gram.
          whole_below: a document of fewer words, but at least one, has one n-gram of all its words.
        """
        lengths = np.diff(self.offsets)
        counts = np.maximum(lengths - n + 1, 0)
        sizes = np.full(len(lengths), n)
        if whole_below:
            is_short = (lengths > 0) & (lengths < n)
            is_short[0] &= self.earlier_words + lengths[0] < n
            if self.is_open:
                is_short[-1] = False  # more of its words may follow, and these are carried
            counts, sizes = counts + is_short, np.where(is_short, lengths, n)
        bounds = np.concatenate([[0], np.cumsum(counts)])
        starts = np.arange(bounds[-1]) + np.repeat(self.offsets[:-1] - bounds[:-1], counts)
        return polynomial(self.hashes, starts, starts + np.repeat(sizes, counts)), bounds


def documents_of(chunks: Iterable[TextChunk]) -> Documents:
    """Groups the chunks of a unit into documents, which are read one after another."""
    for number, group in itertools.groupby(chunks, lambda chunk: chunk.document):
        yield number, (chunk.text for chunk in group)


def word_blocks(documents: Documents, carried: int, block_chars: int = BLOCK_CHARS) -> Iterator[WordBlock]:
    """Hashes the words of documents, in blocks of about `block_chars` characters or of one chunk."""
    numbers: list[int] = []  # of the chunks in the block
    texts: list[str] = []
    tail = np.zeros(0, np.uint64)  # last words of the first document, where it began in an earlier block
    earlier = 0
    size = 0
    for number, chunks in documents:
        is_first = True
        for chunk in itertools.chain(chunks, [""]):  # so that every document is in a block
            if size >= block_chars:
                block = _block(numbers, texts, tail, not is_first, earlier)
                yield block
                numbers, texts, size = [], [], 0
                last = block.hashes[block.offsets[-2] if block.is_open else len(block.hashes) :]
                tail = last[max(len(last) - carried, 0) :]
                earlier = len(last) - len(tail) + (earlier if len(block.documents) == 1 and block.is_open else 0)
            is_first = False
            text = unicodedata.normalize("NFC", chunk).lower()
            numbers.append(number)
            texts.append(text)
            size += len(text) + 1
    if numbers:
        yield _block(numbers, texts, tail, False, earlier)


def _block(chunk_documents: list[int], texts: list[str], tail: np.ndarray, is_open: bool, earlier: int) -> WordBlock:
    hashes, starts = hash_words("\n".join([*texts, ""]))
    ends = np.cumsum([len(text) + 1 for text in texts])
    words_before = np.concatenate([[0], np.searchsorted(starts, ends) + len(tail)])
    last_chunks = [i for i, n in enumerate(chunk_documents) if chunk_documents[i + 1 : i + 2] != [n]]
    offsets = np.concatenate([[0], words_before[1:][last_chunks]])
    hashes = np.concatenate([tail, hashes]) if len(tail) else hashes
    return WordBlock([chunk_documents[i] for i in last_chunks], offsets, hashes, is_open, earlier)


def hash_words(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hashes of the words of normalised text, uint64 (W,), and where each begins, int64 (W,)."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    kind = np.zeros(len(codes) + 2, np.uint8)
    np.take(_classes(), codes, mode="clip", out=kind[1:-1])
    # A boundary lies between two characters unless both are letters.
    joins = (kind[1:] == _LETTER) & (kind[:-1] == _LETTER)
    is_word = kind[1:-1] != 0
    starts = np.flatnonzero(is_word & ~joins[:-1])
    ends = np.flatnonzero(is_word & ~joins[1:]) + 1
    return polynomial(codes.astype(np.uint64) + np.uint64(1), starts, ends), starts


def polynomial(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns a hash of each values[start:end], uint64, in linear time: differences of one cumulative sum."""
    power, inverse = _powers(1 << max(len(values), 1).bit_length())
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * power[: len(values)], out=sums[1:])
    return mixed((sums[ends] - sums[starts]) * inverse[starts])


def mixed(values: np.ndarray) -> np.ndarray:
    """Returns a bijection of uint64 values in which every bit of a value changes about half of the bits."""
    for shift, factor in ((32, 0xD6E8FEB86659FD93), (32, 0xD6E8FEB86659FD93)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(32))


@functools.lru_cache(maxsize=2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the powers of the base, and of its inverse, modulo 2^64."""
    bases = (_BASE, pow(_BASE, -1, 1 << 64))
    first, second = (np.multiply.accumulate(np.full(count, base, np.uint64)) for base in bases)
    return first, second


@functools.cache
def _classes() -> np.ndarray:
    """Returns uint8 (code points,): 0 separates words, 1 belongs to a word, 2 is a word."""
    table = np.full(_CLASSES, _LETTER, np.uint8)
    for code in range(_CLASSES - 1):
        char = chr(code)
        if unicodedata.category(char)[0] not in "LMN" and unicodedata.category(char) != "Cn":
            table[code] = 0
        elif not words.stands_alone(char):
            table[code] = _STANDS_ALONE
    return table
