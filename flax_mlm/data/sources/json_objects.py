"""Documents from JSON objects: one a line, one after another in any layout, or the elements of a list.

The beginning of a file shows which it is. Only lines are divided into ranges of bytes.
"""

import codecs
import functools
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from flax_mlm.data.sources import base, plain
from flax_mlm.data.sources.base import Range
from flax_mlm.data.sources.columns import MISSING, Columns, chosen, document_chunks, lookup, no_column
from flax_mlm.data.sources.files import File
from flax_mlm.data.text import UTF_8, blocks, decode, opened
from flax_mlm.errors import UserError, json_kind

_MAX_CHARS = 1 << 26  # of an object; a bracket or quote that is not closed would take all that follows
_MAX_LINE = 1 << 28  # bytes of a line of such an object, with its escapes
_EXPECTED = "JSON objects: one a line, one after another, or in a list"
_LINES, _OBJECTS, _LIST = "lines", "objects", "list"
_SPACE = re.compile(r"[ \t\n\r]*")


def json_ranges(file: File, columns: Columns, encoding: str = UTF_8) -> Iterator[Range]:
    """Divides a file where that is possible."""
    read = functools.partial(read_json, columns=columns, encoding=encoding)
    is_divisible = file.size > base.UNIT_BYTES and _layout(file, encoding) == _LINES
    yield from plain.line_ranges(file, read, encoding, is_divisible)


def columns_of(files: Iterable[File], columns: Columns | None, encoding: str = UTF_8) -> Columns:
    """Returns the columns, as the first object of the files has them; where none are named, the field that is clearly
    the text. Raises UserError if it has none of them."""
    for file in files:
        with file.reading() as raw:
            text = opened(file.path, raw, encoding, Counter())
            _, record = next(_records(file, text, Counter(), 0, sys.maxsize, encoding), (0, None))
        if record is None:
            continue
        where = f"the first object of {file.path}"
        texts = [name for name, value in record.items() if isinstance(value, str)]
        columns = chosen(columns, where, record, texts, "field")
        for name in columns.names:
            if lookup(record, name) is MISSING:
                raise no_column(where, name, _fields(record), "field")
        return columns
    return columns or Columns(("", "text", ""))


def _fields(record: dict[str, Any], prefix: str = "") -> list[str]:
    """Names the fields, with those of nested objects."""
    nested = (_fields(v, f"{prefix}{k}.") if isinstance(v, dict) and v else [prefix + k] for k, v in record.items())
    return list(itertools.chain(*nested))


def read_json(
    file: File, text: BinaryIO, counts: Counter[str], start: int, end: int, columns: Columns, encoding: str
) -> Iterator[tuple[int, str]]:
    """Reads documents from the objects that begin in a range."""
    for key, record in _records(file, text, counts, start, end, encoding):
        document = columns.document([lookup(record, name) for name in columns.names], counts)
        if document is not None:
            yield from ((key, chunk) for chunk in document_chunks(document, counts))


def _records(
    file: File, text: BinaryIO, counts: Counter[str], start: int, end: int, encoding: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads (a number that tells objects apart, object). Raises UserError where something else stands."""
    blank, head, layout = (b"", b"", _LINES) if start else _beginning(text)
    if layout == _LINES:
        name = functools.partial(plain.line_name, file, encoding=encoding)
        further = iter(lambda: text.readline(_MAX_LINE), b"")
        return _lines(name, itertools.chain([head] if head else [], further), counts, start + len(blank), end)
    text_before = decode(blank + head, counts).removeprefix("\ufeff")
    return _values(file, itertools.chain([text_before], blocks(text, counts)), layout == _LIST)


def _beginning(text: BinaryIO) -> tuple[bytes, bytes, str]:
    """Reads blank lines and, unless it is long and of a list, the first line. Returns them and the layout."""
    blank = b""
    while (head := text.readline(1 << 16)) and not head.removeprefix(codecs.BOM_UTF8).strip():
        blank += head
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return blank, head, _LIST
    if not head.endswith(b"\n"):
        head += text.readline(_MAX_LINE)
    if not head.lstrip().removeprefix(codecs.BOM_UTF8).startswith(b"{"):
        return blank, head, _LINES  # where the error names its line
    try:
        json.loads(decode(head, Counter()).removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return blank, head, _OBJECTS
    return blank, head, _LINES


def _layout(file: File, encoding: str) -> str:
    with file.reading() as raw:
        return _beginning(opened(file.path, raw, encoding, Counter()))[2]


def _lines(
    name: Callable[[int], str], lines: Iterable[bytes], counts: Counter[str], begin: int, end: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    for line in lines:
        offset, begin = begin, begin + len(line)
        if offset >= end:
            return
        if not line.strip():
            continue
        if len(line) >= _MAX_LINE:
            raise UserError(f"{name(offset)} has a line of more than {_MAX_LINE:,} bytes; expected {_EXPECTED}")
        try:
            record = json.loads(decode(line, counts).removeprefix("\ufeff"))
        except (ValueError, RecursionError) as e:
            raise UserError(f"{name(offset)} is not JSON: {e}; expected {_EXPECTED}") from e
        if not isinstance(record, dict):
            what = f"{name(offset)} is {json_kind(record)}"
            raise UserError(f"{what}; expected {_EXPECTED}")
        yield offset, record


def _values(file: File, parts: Iterator[str], is_list: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads objects from text that comes in parts of any size, and holds one object of it at a time."""
    buffer = _Buffer(file, parts)
    number = 0
    if is_list:
        buffer.expect("[")
    while (character := buffer.next_character()) and not (is_list and character == "]"):
        if is_list and number:
            buffer.expect(",")
            character = buffer.next_character()
        if character != "{":
            raise buffer.error(f"is no object, as '{character}' shows" if character else "ends early")
        yield number, buffer.read_object()
        number += 1
    if is_list:
        buffer.expect("]")
        if character := buffer.next_character():
            raise buffer.error(f"has '{character}' after the end of the list")


class _Buffer:
    """Text of which what has been read is forgotten."""

    def __init__(self, file: File, parts: Iterator[str]):
        self._file, self._parts = file, parts
        self._text, self._at, self._line = "", 0, 1  # the number of the line where the text begins
        self._decode = json.JSONDecoder().raw_decode

    def next_character(self) -> str:
        """Skips space, and returns the character after it without reading it; empty: this is the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._grow(1):
                return self._text[self._at : self._at + 1]

    def expect(self, character: str) -> None:
        """Reads a character. Raises UserError if another one stands there."""
        found = self.next_character()
        if found != character:
            raise self.error(f"has '{found}', and not '{character}'" if found else f"ends early, without '{character}'")
        self._at += 1

    def read_object(self) -> dict[str, Any]:
        """Reads the object that begins here. Raises UserError."""
        while True:
            try:
                value, self._at = self._decode(self._text, self._at)
                return value
            except json.JSONDecodeError as e:
                # Only where the text ends may what follows mend it; twice as much avoids decoding it often.
                may_continue = e.msg.startswith("Unterminated string") or e.pos >= len(self._text) - 12
                size = len(self._text) - self._at
                if size > _MAX_CHARS:
                    raise self.error(f"begins an object of more than {_MAX_CHARS:,} characters") from e
                if not (may_continue and self._grow(size)):
                    self._line += self._text.count("\n", 0, e.pos)
                    self._text = ""
                    raise self.error(f"is not JSON: {e.msg}") from e
            except RecursionError as e:
                raise self.error(f"is not JSON: {e}") from e

    def error(self, what: str) -> UserError:
        """Makes an error that names the line."""
        line = self._line + self._text.count("\n", 0, self._at)
        return UserError(f"{self._file.path}:{line} {what}; expected {_EXPECTED}")

    def _grow(self, size: int) -> bool:
        """Forgets what has been read, and reads at least as many characters more; False: there are none."""
        parts, total = [self._text[self._at :]], 0
        while total < max(size, 1) and (part := next(self._parts, None)) is not None:
            parts.append(part)
            total += len(part)
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = "".join(parts), 0
        return total > 0
