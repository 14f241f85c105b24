"""Documents that share text with evaluation files: an n-gram of 13 words, as `word_hashes` says what a word is.

All strings of an evaluation file count: every string of JSON (.json, .jsonl, .ndjson), every cell of a table (.csv,
.tsv), and any other file as one text; all of them also as .gz, .zst, .bz2 or .xz. A text of fewer than 13 words has no
such n-gram: the report says for each file how many of its texts these are.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from flax_mlm.data.cleaning.word_hashes import WordBlock, word_blocks
from flax_mlm.data.sources.files import File, find_files
from flax_mlm.data.text import cut, decode, opened
from flax_mlm.errors import UserError

SHARED_WORDS = 13
# An n-gram that a document shares with an evaluation file, by their numbers; `ngrams` counts occurrences.
HIT_DTYPE = np.dtype([("document", "<i8"), ("file", "<i4"), ("ngrams", "<i8")])

_FIELD = "data.decontaminate"
_CHUNK_CHARS = 1 << 16
_FILTER_BITS = 22
_TABLES = {".csv": ",", ".tsv": "\t"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_COLUMNAR = {b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file"}
_JSON = (".json", ".jsonl", ".ndjson")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The n-grams of evaluation files. It can be sent to other processes.

    Attributes:
      files: names.
      texts: number of texts in each file.
      short_texts: of these, the number of texts that have fewer than 13 words.
      ngrams: uint64 (G,), hashes in ascending order, once for each file that has them.
      owners: int32 (G,), numbers of these files.
    """

    files: tuple[str, ...]
    texts: tuple[int, ...]
    short_texts: tuple[int, ...]
    ngrams: np.ndarray
    owners: np.ndarray

    @property
    def digest(self) -> str:
        """The hexadecimal hash of the n-grams, for what depends on them."""
        return hashlib.blake2b(self.ngrams.tobytes() + self.owners.tobytes(), digest_size=16).hexdigest()

    @functools.cached_property
    def _filter(self) -> np.ndarray:
        """Returns bool (2^22,): some n-gram begins with these bits. Most n-grams of a corpus need no search."""
        table = np.zeros(1 << _FILTER_BITS, bool)
        table[self.ngrams >> np.uint64(64 - _FILTER_BITS)] = True
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def find(self, block: WordBlock) -> np.ndarray:
        """Finds the documents of a block that share n-grams: HIT_DTYPE, one for each document and file."""
        hashes, bounds = block.ngrams(SHARED_WORDS)
        possible = np.flatnonzero(self._filter[hashes >> np.uint64(64 - _FILTER_BITS)])
        first = np.searchsorted(self.ngrams, hashes[possible])
        counts = np.searchsorted(self.ngrams, hashes[possible], side="right") - first
        where = np.repeat(possible, counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        owners = self.owners[np.repeat(first, counts) + within]
        documents = np.searchsorted(bounds, where, side="right") - 1
        pairs, ngrams = np.unique(np.stack([documents, owners]), axis=1, return_counts=True)
        hits = np.zeros(len(ngrams), HIT_DTYPE)
        hits["document"] = np.array(block.documents, np.int64)[pairs[0]]
        hits["file"], hits["ngrams"] = pairs[1], ngrams
        return hits


class Hits:
    """Hits of documents that are read in several blocks, added up."""

    def __init__(self) -> None:
        self._counts: dict[int, Counter[int]] = {}

    def add(self, evaluation: Evaluation, block: WordBlock) -> None:
        for document, file, ngrams in evaluation.find(block).tolist():
            self._counts.setdefault(document, Counter())[file] += ngrams

    def take(self, documents: Sequence[int]) -> np.ndarray:
        """Removes and returns the hits of these documents: HIT_DTYPE."""
        found = [
            (document, *item)
            for document in documents
            if self._counts and document in self._counts
            for item in sorted(self._counts.pop(document).items())
        ]
        return np.array(found, HIT_DTYPE)


def read_evaluation(patterns: Sequence[str]) -> Evaluation:
    """Reads evaluation files. Raises UserError: a glob matches no file, or a file cannot be read."""
    found: dict[str, File] = {}
    for pattern in patterns:
        found.update((file.path, file) for file in find_files(f"{_FIELD} has '{pattern}'", pattern))
    grams, owners, texts, short = [], [], [], []
    for number, file in enumerate(found.values()):
        found_grams, count, too_short = _file_ngrams(file)
        grams.append(found_grams)
        owners.append(np.full(len(found_grams), number, np.int32))
        texts.append(count)
        short.append(too_short)
    hashes = np.concatenate([np.zeros(0, np.uint64), *grams])
    order = np.argsort(hashes, kind="stable")
    files = tuple(found)
    numbers = np.concatenate([np.zeros(0, np.int32), *owners])
    return Evaluation(files, tuple(texts), tuple(short), hashes[order], numbers[order])


def _file_ngrams(file: File) -> tuple[np.ndarray, int, int]:
    """Returns the different n-grams of a file, the number of its texts, and of those that are too short."""
    texts = ((number, cut(text, _CHUNK_CHARS)) for number, text in enumerate(file_texts(file)))
    found = [np.zeros(0, np.uint64)]
    lengths: Counter[int] = Counter()
    carried = SHARED_WORDS - 1
    for block in word_blocks(texts, carried):
        found.append(np.unique(block.ngrams(SHARED_WORDS)[0]))
        for document, words in zip(block.documents, np.diff(block.offsets).tolist(), strict=True):
            lengths[document] = max(lengths[document], words)  # of a text of several blocks, at least 13
    return np.unique(np.concatenate(found)), len(lengths), sum(n < SHARED_WORDS for n in lengths.values())


def file_texts(file: File) -> Iterator[str]:
    """Reads the strings of an evaluation file that are not blank. Raises UserError: it is damaged."""
    path = PurePath(file.path)
    suffix = (path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix
    with file.reading() as raw:
        for begins, what in _COLUMNAR.items():
            if raw.peek(8).startswith(begins):  # type: ignore[attr-defined]
                expected = "expected JSON, CSV, TSV or plain text; write its columns of text as JSON lines"
                raise UserError(f"{file.path} is {what}; {expected}")
        text = decode(opened(file.path, raw).read(), Counter()).removeprefix("\ufeff")
    strings: Iterator[str] = iter([text])
    if suffix in _JSON:
        strings = itertools.chain.from_iterable(map(_strings, _json_values(file.path, text, suffix)))
    elif suffix in _TABLES:
        csv.field_size_limit(1 << 30)
        strings = itertools.chain.from_iterable(_cells(file.path, text, _TABLES[suffix]))
    return filter(str.strip, strings)


def _json_values(path: str, text: str, suffix: str) -> Iterator[Any]:
    if suffix == ".json":
        try:
            yield json.loads(text)
            return
        except (ValueError, RecursionError):
            pass  # lines of JSON have this suffix, too
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}:{number} is not JSON: {e}; expected JSON lines, or one value in .json") from e


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _cells(path: str, text: str, delimiter: str) -> Iterator[list[str]]:
    # Quotes have no meaning in tab-separated files of the usual benchmarks (GLUE).
    dialect: Any = {"quoting": csv.QUOTE_NONE} if delimiter == "\t" else {}
    try:
        yield from csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, **dialect)
    except csv.Error as e:
        raise UserError(f"{path} is not a table: {e}; check its quotes") from e
