"""Documents from WikiExtractor's output: its tags `<doc ...>`, or its JSON objects, one a line (`--json`).

The beginning of each file says which. The text is kept as it is, with its line of the title and its HTML entities.
"""

from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from flax_mlm.data.sources.base import Range
from flax_mlm.data.sources.columns import DEFAULT, Columns
from flax_mlm.data.sources.files import File
from flax_mlm.data.sources.json_objects import read_json
from flax_mlm.data.sources.plain import line_ranges
from flax_mlm.data.text import CHUNK_CHARS, UTF_8, WIKIEXTRACTOR, line_chunks, opened
from flax_mlm.errors import UserError

_BEGIN, _END = "<doc ", "</doc>"


def ranges(file: File) -> Iterator[Range]:
    """Divides a file; a document belongs to the range in which its line `<doc ...>`, or its object, begins."""
    return line_ranges(file, documents, accepted=WIKIEXTRACTOR)


def check(file: File) -> None:
    """Raises UserError if the beginning of a file shows that it is no output of WikiExtractor."""
    _is_json(file)


def documents(file: File, text: BinaryIO, counts: Counter[str], start: int, end: int) -> Iterator[tuple[int, str]]:
    """Reads the documents that begin in a range."""
    if _is_json(file):
        return read_json(file, text, counts, start, end, Columns(("", DEFAULT, "")), UTF_8)
    return tagged(file, text, counts, start, end)


def _is_json(file: File) -> bool:
    """Returns whether a file holds JSON objects."""
    with file.reading() as raw:
        text = opened(file.path, raw, accepted=WIKIEXTRACTOR)
        first = next((line.lstrip() for _, line, _ in line_chunks(text, Counter()) if line.strip()), _BEGIN)
    if not first.startswith((_BEGIN, "{")):
        what = f"{file.path} begins with '{first.strip()[:40]}'"
        raise UserError(f"{what}; expected WikiExtractor's output: <doc id=...>, or a JSON object a line")
    return first.startswith("{")


def tagged(file: File, text: BinaryIO, counts: Counter[str], start: int, end: int) -> Iterator[tuple[int, str]]:
    """Reads the texts between lines `<doc ...>` and `</doc>`."""
    document = -1  # where the current one begins
    buffer: list[str] = []
    size, is_whole, is_tag, line_starts, is_after_begin = 0, True, False, True, not start
    for offset, line, ends in line_chunks(text, counts, start):
        if offset >= end and not is_after_begin:  # no document begins in the range
            return
        begins, closes = (line_starts and line.startswith(tag) for tag in (_BEGIN, _END))
        if begins or (closes and document >= 0):
            yield from _last(document, buffer, counts, is_whole)
            buffer, size, is_whole, document = [], 0, True, -1
        if begins:
            if offset >= end:
                return
            document, is_after_begin = offset, True
        is_tag = is_tag if not line_starts else begins or closes
        line_starts = ends
        if is_tag or not (buffer or line.strip()):
            continue
        if document < 0:  # before the first line <doc of a range, it is the end of a document of the range before
            counts["lines_outside_documents"] += is_after_begin and ends
            continue
        if size and size + len(line) > CHUNK_CHARS:
            yield document, "".join(buffer)
            buffer, size, is_whole = [], 0, False
        buffer.append(line)
        size += len(line)
    if document >= 0:
        raise UserError(f"{file.path} ends inside a document, without </doc>; check that the file is complete")


def _last(document: int, buffer: list[str], counts: Counter[str], is_whole: bool) -> Iterator[tuple[int, str]]:
    """The last chunk of a document; an empty document is counted.

    Args:
      is_whole: there was no chunk before.
    """
    text = "".join(buffer)
    if text.strip():
        yield document, text.rstrip("\n")
    elif document >= 0:
        counts["empty_documents"] += is_whole
