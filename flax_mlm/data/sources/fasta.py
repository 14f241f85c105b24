"""Documents from FASTA files: one sequence a record, without its header.

As in BioPython, the lines of a record are joined without whitespace, and `*` and lower case are kept.
"""

from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from flax_mlm.data.sources.base import Range
from flax_mlm.data.sources.files import File
from flax_mlm.data.sources.plain import line_ranges
from flax_mlm.data.text import CHUNK_CHARS, line_chunks, opened
from flax_mlm.errors import UserError


def ranges(file: File) -> Iterator[Range]:
    """Divides a file; a record belongs to the range in which its line `>` begins."""
    return line_ranges(file, sequences)


def check(file: File) -> None:
    """Raises UserError if a file does not begin with a record."""
    with file.reading() as raw:
        for _ in sequences(file, opened(file.path, raw), Counter(), 0, 1):
            return


def sequences(file: File, text: BinaryIO, counts: Counter[str], start: int, end: int) -> Iterator[tuple[int, str]]:
    """Reads the sequences of the records that begin in a range. Lines that begin with `;` are comments."""
    record = -1  # where the current one begins
    buffer: list[str] = []
    size, is_sequence, line_starts = 0, False, True
    for offset, line, ends in line_chunks(text, counts, start):
        if start and record < 0 and offset >= end:  # no record begins in the range
            return
        is_header = line_starts and line.startswith(">")
        if is_header:
            if size:
                yield record, "".join(buffer)
            counts["empty_documents"] += record >= 0 and not size
            if offset >= end:
                return
            record, buffer, size = offset, [], 0
        if line_starts:
            is_comment = line.startswith(";")
            is_sequence = not (is_header or is_comment)
            counts["comment_lines"] += is_comment and (record >= 0 or not start)
        line_starts = ends
        letters = "".join(line.split()) if is_sequence else ""
        if not letters or (record < 0 and start):  # before the first header, it is a record of the range before
            continue
        if record < 0:
            what = f"{file.path} does not begin with a record of FASTA, but with '{line.strip()[:40]}'"
            raise UserError(f"{what}; expected a line '>NAME'")
        if size and size + len(letters) > CHUNK_CHARS:
            yield record, "".join(buffer)
            buffer, size = [], 0
        buffer.append(letters)
        size += len(letters)
    if size:
        yield record, "".join(buffer)
    counts["empty_documents"] += record >= 0 and not size
