"""Documents from plain text: blocks between blank lines, lines, or whole files."""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeAlias

from flax_mlm.data.sources import base
from flax_mlm.data.sources.base import Range
from flax_mlm.data.sources.files import File
from flax_mlm.data.text import CHUNK_CHARS, UTF_8, divisible, line_chunks, opened, to_next_line

# Reads the documents that begin in a range of bytes of an open file, as (offset of the document's first byte, chunk).
# Bytes before the offset `start` have been read.
LineReader: TypeAlias = Callable[[File, BinaryIO, Counter[str], int, int], Iterator[tuple[int, str]]]


def line_ranges(
    file: File, read: LineReader, encoding: str = UTF_8, is_divisible: bool = True, accepted: str = ""
) -> Iterator[Range]:
    """Divides a file of lines into ranges of `UNIT_BYTES`; a compressed file, or one whose encoding does not allow it,
    is one range.

    Args:
      accepted: see `opened`.
    """
    starts = (list(range(0, file.size, base.UNIT_BYTES)) if is_divisible else []) or [0]
    if len(starts) > 1:
        with file.reading() as raw:
            starts = starts if divisible(file.path, raw, encoding) else [0]
    for start in starts:
        end = start + base.UNIT_BYTES if start != starts[-1] else sys.maxsize
        reader = functools.partial(_read, file, read, encoding, accepted, start, end)
        yield Range(file.path, min(end, file.size) - start, reader, start == 0, end == sys.maxsize)


def _read(
    file: File, read: LineReader, encoding: str, accepted: str, start: int, end: int, counts: Counter[str]
) -> Iterator[tuple[int, str]]:
    before = counts["read"]
    with file.reading() as raw:
        text = opened(file.path, raw, encoding, counts, accepted)
        begin = to_next_line(text, start)
        for offset, chunk in read(file, text, counts, begin, end):
            counts["read"] = before + min(raw.tell(), end, file.size) - start
            yield offset, chunk


def check(file: File, encoding: str = UTF_8) -> None:
    """Raises UserError if the beginning of a file shows that it is no text."""
    with file.reading() as raw:
        opened(file.path, raw, encoding, Counter())


def line_name(file: File, offset: int, encoding: str = UTF_8) -> str:
    """Names a line by its number, which is known only where it is counted: FILE:LINE."""
    with file.reading() as raw:
        text, number, left = opened(file.path, raw, encoding), 1, offset
        while left and (data := text.read(min(left, 1 << 20))):
            left -= len(data)
            number += data.count(b"\n")
    return f"{file.path}:{number}"


def blocks(file: File, text: BinaryIO, counts: Counter[str], start: int, end: int) -> Iterator[tuple[int, str]]:
    """Reads documents between blank lines. The last blank line before a document decides which range it is in."""
    if start and (start := _to_blank_line(text, start, end)) >= end:
        return
    buffer: list[str] = []
    size = document = 0
    line_starts = document_starts = True
    for offset, line, ends in line_chunks(text, counts, start):
        is_blank = line_starts and ends and not line.strip()
        if is_blank:
            if buffer:
                yield document, "".join(buffer).rstrip("\n")
            buffer, size, document_starts = [], 0, True
            if offset >= end:
                return
        else:
            if line_starts and line.startswith(("<doc id=", "</doc>")):
                counts["wikiextractor_tags"] += 1
            if document_starts:
                document, document_starts = offset, False
            if size and size + len(line) > CHUNK_CHARS:
                yield document, "".join(buffer)
                buffer, size = [], 0
            buffer.append(line)
            size += len(line)
        line_starts = ends
    if any(line.strip() for line in buffer):
        yield document, "".join(buffer).rstrip("\n")


def _to_blank_line(text: BinaryIO, offset: int, end: int) -> int:
    """Moves to the next blank line. Returns its offset, or `end` if none begins before that."""
    line_starts = True
    for start, line, ends in line_chunks(text, Counter(), offset):
        if start >= end:
            break
        if line_starts and ends and not line.strip():
            text.seek(start)
            return start
        line_starts = ends
    return end


def whole(file: File, text: BinaryIO, counts: Counter[str], start: int, end: int) -> Iterator[tuple[int, str]]:
    """Reads a document that is the whole file."""
    buffer: list[str] = []
    size = 0
    for _, line, _ in line_chunks(text, counts, start):
        if size and size + len(line) > CHUNK_CHARS:
            yield 0, "".join(buffer)
            buffer, size = [], 0
        if buffer or line.strip():
            buffer.append(line)
            size += len(line)
    if any(line.strip() for line in buffer):
        yield 0, "".join(buffer).rstrip("\n")


def lines(file: File, text: BinaryIO, counts: Counter[str], start: int, end: int) -> Iterator[tuple[int, str]]:
    """Reads documents of one line each."""
    document, begins = 0, True
    for offset, line, begins_next in line_chunks(text, counts, start):
        document = offset if begins else document
        if begins and offset >= end:
            return
        begins = begins_next
        if line.strip():
            yield document, line.rstrip("\n")
