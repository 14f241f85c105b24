"""Sources of documents, and the units in which they are read.

A source is a list of units. They are bounded, numbered by the source alone, and can be read by themselves, in any
process and any order. A unit consists of ranges of files: row groups, or ranges of bytes. A document belongs to the
range in which it begins. Consecutive ranges share a unit while their sizes sum to at most `UNIT_BYTES`.

Text of a unit beyond `UNIT_BYTES`, such as that of a large compressed file, is divided into parts, which
`prepare` packs one by one: memory is bounded whatever the source is.

A document is read as chunks of at most about `CHUNK_CHARS` characters, so that a file of one line and any size needs
bounded memory. Chunks of one document have the same document number.
"""

import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

UNIT_BYTES = 1 << 26
_HASHED_BYTES = 1 << 20  # of a document; what follows does not count, so that it can be read in bounded memory
_WHITESPACE = b" \t\n\r\v\f"


class TextChunk(NamedTuple):
    """Part of a document, of whole lines or words where there are any.

    Attributes:
      unit: number in the source.
      document: number in the unit.
      hash: of the whole document, see `hashed`.
      file: path of its file; empty where there is none.
      part: number in the unit.
      ids: tokens of the chunk where the source gives them, (n,) uint32.
    """

    unit: int
    document: int
    text: str
    hash: float = math.nan
    file: str = ""
    part: int = 0
    ids: np.ndarray | None = None

    @property
    def part_key(self) -> tuple[int, int]:
        """Unit and part."""
        return self.unit, self.part


class Tokens(NamedTuple):
    """A chunk of a document that the source gives as ids of tokens, (n,) uint32, and what they spell."""

    text: str
    ids: np.ndarray


# Reads a range as (any number that tells its documents apart, chunk of the document), and adds to counts as it goes.
# It may add what it has read to counts["read"], at most the range's size.
Reader: TypeAlias = Callable[[Counter[str]], Iterator[tuple[int, str | Tokens]]]


@dataclasses.dataclass(frozen=True)
class Range:
    """A range of a file that can be read by itself.

    Attributes:
      file: path or URL; empty where there is none.
      size: bytes.
      read: can be pickled.
      is_first, is_last: in its file.
    """

    file: str
    size: int
    read: Reader
    is_first: bool = True
    is_last: bool = True


@dataclasses.dataclass(frozen=True)
class Unit:
    """Ranges that are read together; it can be pickled.

    Attributes:
      number: in the source.
      dropped: numbers of documents that are left out, which those of the others do not depend on.
    """

    number: int
    ranges: tuple[Range, ...]
    dropped: frozenset[int] = frozenset()

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(each.size for each in self.ranges)

    def chunks(
        self, counts: Counter[str] | None = None, by_file: dict[str, Counter[str]] | None = None
    ) -> Iterator[TextChunk]:
        """Reads the unit from its start, and adds to the given counts as it goes.

        Args:
          counts: read (bytes), files, empty_files, empty_documents, undecodable_bytes, nul_bytes, and further ones of a
            format.
          by_file: each of them but `read` and `files` -> file -> its number there.
        """
        numbers, numbers_by_file = Counter() if counts is None else counts, {} if by_file is None else by_file
        return hashed(self._numbered(self._texts(numbers, numbers_by_file)))

    def _texts(
        self, counts: Counter[str], by_file: dict[str, Counter[str]]
    ) -> Iterator[tuple[tuple[int, int], Any, str]]:
        """Reads (key of the document, its next chunk, file)."""
        for number, each in enumerate(self.ranges):
            finished, before = counts["read"], counts.copy()
            counts["files"] += each.is_first and bool(each.file)
            is_empty = True
            for key, content in each.read(counts):
                is_empty = False
                yield (number, key), content, each.file
            counts["read"] = finished + each.size
            counts["empty_files"] += is_empty and each.is_first and each.is_last and bool(each.file)
            for kind, number_here in (counts - before).items():
                if kind not in ("read", "files"):
                    by_file.setdefault(kind, Counter())[each.file] += number_here

    def _numbered(self, texts: Iterable[tuple[tuple[int, int], Any, str]]) -> Iterator[TextChunk]:
        """Numbers documents and parts. A new part begins at the first document after `UNIT_BYTES` of text, and in a
        document that has as many itself."""
        part = part_size = 0
        for document, (_, group) in enumerate(itertools.groupby(texts, lambda each: each[0])):
            if document in self.dropped:
                continue
            document_size = 0  # in this part
            for _, content, file in group:
                if max(document_size, 0 if document_size else part_size) >= UNIT_BYTES:
                    part += 1
                    part_size = document_size = 0
                text, ids = content if isinstance(content, Tokens) else (content, None)
                yield TextChunk(self.number, document, text, file=file, part=part, ids=ids)
                size = len(text) if text.isascii() else len(text.encode())
                part_size += size
                document_size += size


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents to prepare.

    Attributes:
      name: description for people.
      licence: licence of the text.
      version: JSON-able; two sources with the same version give the same documents.
      units: numbered from 0.
      check: raises UserError where the beginning of a file shows that it is not what the source says.
    """

    name: str
    licence: str
    version: Any
    units: tuple[Unit, ...]
    check: Callable[[], None] = lambda: None

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(unit.size for unit in self.units)

    def chunks(
        self, counts: Counter[str] | None = None, by_file: dict[str, Counter[str]] | None = None
    ) -> Iterator[TextChunk]:
        """Reads all units, see `Unit.chunks`."""
        numbers, numbers_by_file = Counter() if counts is None else counts, {} if by_file is None else by_file
        for unit in self.units:
            yield from unit.chunks(numbers, numbers_by_file)


def grouped(ranges: Iterable[Range], first: int = 0) -> tuple[Unit, ...]:
    """Groups ranges into units, which are numbered from `first`."""
    groups: list[list[Range]] = []
    size = 0
    for each in ranges:
        if not groups or size + each.size > UNIT_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(each)
        size += each.size
    return tuple(Unit(number, tuple(group)) for number, group in enumerate(groups, first))


def hashed(chunks: Iterable[TextChunk]) -> Iterator[TextChunk]:
    """Sets the hash of each chunk's document, a number in [0, 1): below `data.validation_fraction` it is held out.

    The hash is of the first MiB of the document in UTF-8 without ASCII whitespace, so a document has the same hash in
    every source, format and order, and copies of it are always in the same split.
    """
    for _, document in itertools.groupby(chunks, lambda chunk: chunk[:2]):
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
