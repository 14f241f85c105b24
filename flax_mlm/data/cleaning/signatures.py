"""Signature files: what is compared of each document of a unit, instead of its text.

`exact` compares a 128-bit hash of the text without surrounding whitespace. `near` compares also MinHash signatures: the
least values of 128 permutations of the hashed n-grams of five words (`word_hashes` says what a word is). A document of
fewer words is one n-gram of them all, and one without any word is no near-duplicate of another. Two documents agree at
each of the 128 positions with a probability that is their Jaccard similarity: the number of n-grams that both have, by
the number that at least one of them has.

A permutation is x -> a x + b modulo 2^32 with an odd a, of 32-bit hashes. Its numbers are constants here, so that a
signature follows from the text alone. A library with signatures as fast exists (rensa), but versions of it give
different ones.
"""

import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

from flax_mlm.data.cleaning.contamination import SHARED_WORDS, Evaluation, Hits
from flax_mlm.data.cleaning.word_hashes import Documents, WordBlock, mixed, word_blocks
from flax_mlm.errors import UserError
from flax_mlm.storage import bucket_sources, buckets, files
from flax_mlm.storage.gcs import AnyPath

PERMUTATIONS = 128
NGRAM_WORDS = 5
NO_WORDS = np.uint32(0xFFFFFFFF)  # at all positions of a document without words
DEDUP = ("none", "exact", "near")

_FORMAT = 1
_BLOCK_DOCUMENTS = 4096  # of the file: 2 MiB of signatures
_NUMBERS = mixed(np.arange(1, 2 * PERMUTATIONS + 1, dtype=np.uint64) << np.uint64(32)).astype(np.uint32)
_FACTORS, _TERMS = _NUMBERS[:PERMUTATIONS] | np.uint32(1), _NUMBERS[PERMUTATIONS:]


@dataclasses.dataclass(frozen=True)
class Signatures:
    """Signatures of documents.

    Attributes:
      documents: int64 (N,), their numbers.
      sizes: int64 (N,), bytes of their text in UTF-8.
      texts: uint64 (N, 2), hash of the text; (N, 0) without deduplication.
      near: uint32 (N, 128), MinHash; (N, 0) unless near-duplicates are looked for.
      hits: HIT_DTYPE, documents that share n-grams with evaluation files.
    """

    documents: np.ndarray
    sizes: np.ndarray
    texts: np.ndarray
    near: np.ndarray
    hits: np.ndarray


def write(file: AnyPath, documents: Documents, dedup: str, evaluation: Evaluation | None = None) -> None:
    """Writes the signature file of a unit, in bounded memory; it is there whole or not at all.

    Args:
      documents: of the unit, in order; chunks end before whitespace, as those of a source.
      dedup: none, exact or near.
      evaluation: texts that documents must not share n-grams with.
    """
    if dedup not in DEDUP:
        raise UserError(f"data.dedup is '{dedup}'; expected {', '.join(DEDUP[:-1])} or {DEDUP[-1]}")
    save(file, make(documents, dedup, evaluation))


def save(file: AnyPath, blocks: Iterable[Signatures]) -> None:
    """Writes a signature file of blocks of signatures; it is there whole or not at all."""
    with _writing(file) as opened:
        for block in blocks:
            for array in (np.array([_FORMAT, len(block.documents)]), *vars(block).values()):
                np.lib.format.write_array(opened, array, allow_pickle=False)
        np.lib.format.write_array(opened, np.array([_FORMAT, 0]), allow_pickle=False)


def read(file: AnyPath) -> Iterator[Signatures]:
    """Reads a signature file in blocks of a few thousand documents. Raises UserError: it is damaged."""
    with bucket_sources.open_object(file) if buckets.is_one(file) else open(file, "rb") as opened:
        while _read(file, opened).tolist() != [_FORMAT, 0]:
            yield Signatures(*(_read(file, opened) for _ in dataclasses.fields(Signatures)))


def _read(file: AnyPath, opened: Any) -> np.ndarray:
    try:
        return np.lib.format.read_array(opened, allow_pickle=False)
    except ValueError as e:
        raise UserError(f"{file} is damaged: {e}; delete it, and start the same command again") from e


def make(documents: Documents, dedup: str, evaluation: Evaluation | None = None) -> Iterator[Signatures]:
    """Makes the signatures of documents, in blocks of a few thousand."""
    records, hits = _Records(documents, dedup != "none"), Hits()
    read_words = dedup == "near" or evaluation
    parts = _compared(records, dedup == "near", evaluation, hits) if read_words else _uncompared(records)
    rows: list[np.ndarray] = []
    count = 0
    for part in parts:
        rows.append(part)
        count += len(part)
        if count >= _BLOCK_DOCUMENTS:
            yield records.take(np.concatenate(rows), hits)
            rows, count = [], 0
    if count:
        yield records.take(np.concatenate(rows), hits)


def _compared(records: "_Records", near: bool, evaluation: Evaluation | None, hits: Hits) -> Iterator[np.ndarray]:
    """Yields the MinHash signatures of the documents that are read to their end, without columns unless `near`."""
    width = PERMUTATIONS if near else 0
    unread = np.full((1, width), NO_WORDS)
    partial = unread  # of the document that the block before left open
    for block in word_blocks(records, SHARED_WORDS - 1 if evaluation else NGRAM_WORDS - 1):
        rows = minhash(block) if near else np.zeros((len(block.documents), 0), np.uint32)
        rows[:1] = np.minimum(rows[:1], partial)
        closed = len(rows) - block.is_open
        partial = rows[closed:] if block.is_open else unread
        if evaluation:
            hits.add(evaluation, block)
        yield rows[:closed]


def _uncompared(records: "_Records") -> Iterator[np.ndarray]:
    for _, chunks in records:
        for _ in chunks:
            pass
        yield np.zeros((1, 0), np.uint32)


def minhash(block: WordBlock) -> np.ndarray:
    """Returns the MinHash signatures of the documents of a block, uint32 (D, 128)."""
    hashes, bounds = block.ngrams(NGRAM_WORDS, whole_below=True)
    signatures = np.full((len(block.documents), PERMUTATIONS), NO_WORDS)
    with_words = np.flatnonzero(np.diff(bounds))
    if not len(with_words):
        return signatures
    values, starts = (hashes >> np.uint64(32)).astype(np.uint32), bounds[with_words]
    permuted = np.empty_like(values)
    least = np.empty((PERMUTATIONS, len(with_words)), np.uint32)
    for i in range(PERMUTATIONS):
        np.multiply(values, _FACTORS[i], out=permuted)
        np.add(permuted, _TERMS[i], out=permuted)
        np.minimum.reduceat(permuted, starts, out=least[i])
    signatures[with_words] = least.T
    return signatures


def jaccard(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the estimated similarity of pairs of documents with words, of their signatures (N, 128): float32 (N,)."""
    return (first == second).mean(1, dtype=np.float32)


class _Records:
    """Documents that are measured and hashed while another iterator reads them.

    Attributes:
      done: (number, bytes, digest) of the documents that were read to their end, and not taken yet.
    """

    def __init__(self, documents: Documents, hashed: bool):
        self._documents, self._hashed = documents, hashed
        self.done: list[tuple[int, int, bytes]] = []

    def __iter__(self) -> Iterator[tuple[int, Iterable[str]]]:
        for number, chunks in self._documents:
            yield number, self._read(number, chunks)

    def _read(self, number: int, chunks: Iterable[str]) -> Iterator[str]:
        text, size = _TextHash(), 0
        for chunk in chunks:
            size += len(chunk.encode(errors="surrogatepass"))
            if self._hashed:
                text.update(chunk)
            yield chunk
        self.done.append((number, size, text.digest()))

    def take(self, near: np.ndarray, hits: Hits) -> Signatures:
        """Returns the signatures of the first documents, as many as `near` has rows."""
        done, self.done = self.done[: len(near)], self.done[len(near) :]
        numbers = np.array([number for number, *_ in done], np.int64)
        sizes = np.array([size for _, size, _ in done], np.int64)
        texts = np.frombuffer(b"".join(digest for *_, digest in done), "<u8").reshape(-1, 2)
        return Signatures(numbers, sizes, texts if self._hashed else texts[:, :0], near, hits.take(numbers.tolist()))


class _TextHash:
    """A 128-bit hash of text without surrounding whitespace."""

    def __init__(self) -> None:
        self._hash, self._space, self._began = hashlib.blake2b(digest_size=16), "", False

    def update(self, text: str) -> None:
        text = text if self._began else text.lstrip()
        if body := text.rstrip():
            self._hash.update((self._space + body).encode(errors="surrogatepass"))
            self._space, self._began = text[len(body) :], True
        elif self._began:
            self._space += text

    def digest(self) -> bytes:
        return self._hash.digest()


@contextlib.contextmanager
def _writing(file: AnyPath) -> Iterator[IO[bytes]]:
    if buckets.is_one(file):
        with tempfile.TemporaryFile() as opened:
            yield opened
            opened.seek(0)
            files.write_bytes(file, opened.read())
        return
    folder = os.path.dirname(file)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False) as opened:  # several may write the file
        try:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
            os.replace(opened.name, file)
        except BaseException:
            os.unlink(opened.name)
            raise
