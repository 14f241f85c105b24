"""Documents from tables of text: CSV, and values between tabs.

A file is read from its start to its end, as a newline may stand in quotes. Only one with tabs and without quoted cells
is divided between lines.
"""

import csv
import functools
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import BinaryIO

from flax_mlm.data import tables
from flax_mlm.data.sources import base, plain
from flax_mlm.data.sources.base import Range
from flax_mlm.data.sources.columns import Columns, chosen, document_chunks, no_column
from flax_mlm.data.sources.files import File
from flax_mlm.data.text import UTF_8, blocks, decode, opened
from flax_mlm.errors import UserError

_HEAD_BYTES = 1 << 20  # from which it is seen whether cells are quoted
_SEPARATORS = {"\t": ("tabs", "use tsv:GLOB#column"), ",": ("commas", "use csv:GLOB#column")}
_OTHERS = {";": "semicolons", "|": "bars"}
_CONVERT = "write it with commas, or as Parquet or JSON lines"


def table_ranges(file: File, columns: Columns, delimiter: str, encoding: str = UTF_8) -> Iterator[Range]:
    """Divides a file where that is possible."""
    read = functools.partial(read_table, columns=columns, delimiter=delimiter, encoding=encoding)
    is_divisible = delimiter == "\t" and file.size > base.UNIT_BYTES and not _has_quotes(file, delimiter, encoding)
    yield from plain.line_ranges(file, read, encoding, is_divisible)


def columns_of(files: list[File], columns: Columns | None, delimiter: str, encoding: str = UTF_8) -> Columns:
    """Returns the columns; where none are named, the one that is clearly the text. Raises UserError."""
    if columns:
        return columns
    file = next((file for file in files if file.size), files[0])
    header = _header(file, delimiter, encoding)
    _check_header(file, header, delimiter)
    return chosen(columns, file.path, header, header if len(header) == 1 else ())


def check(file: File, columns: Columns, delimiter: str, encoding: str = UTF_8) -> None:
    """Raises UserError if the beginning of a file shows that it is no such table, or has no such columns."""
    if header := _header(file, delimiter, encoding):
        _indices(file, header, columns, delimiter)


def read_table(
    file: File,
    text: BinaryIO,
    counts: Counter[str],
    start: int,
    end: int,
    columns: Columns,
    delimiter: str,
    encoding: str,
) -> Iterator[tuple[int, str]]:
    """Reads documents from the rows that begin in a range."""
    header = _header(file, delimiter, encoding)
    indices = _indices(file, header, columns, delimiter)
    for number, (key, name, row) in enumerate(_rows(file, text, counts, start, end, delimiter, encoding)):
        if len(row) != len(header):
            what = f"{name(key)} has {len(row)} columns, and the first row {len(header)}"
            separator = _SEPARATORS[delimiter][0]
            raise UserError(f"{what}; where a text holds {separator}, put it into double quotes; else mend the row")
        if number or start or _is_numbered(columns):
            document = columns.document([row[i] for i in indices], counts)
            yield from ((key, chunk) for chunk in document_chunks(document or "", counts))


def _is_numbered(columns: Columns) -> bool:
    return all(name.isdecimal() for name in columns.names)


def _header(file: File, delimiter: str, encoding: str) -> list[str]:
    """Reads the first row; empty: there is none."""
    with file.reading() as raw:
        text = opened(file.path, raw, encoding, Counter())
        rows = _rows(file, text, Counter(), 0, sys.maxsize, delimiter, encoding)
        return [cell.strip() for cell in next(rows, (0, None, []))[2]]


def _indices(file: File, header: list[str], columns: Columns, delimiter: str) -> list[int]:
    """Finds the columns, by their names or, of a table without header, by their numbers from 1. Raises UserError."""
    if header and not (len(columns.names) == 1 and columns.names[0] in header):
        _check_header(file, header, delimiter)
    indices = []
    for name in columns.names if header else ():
        if _is_numbered(columns):
            if not 0 < int(name) <= len(header):
                raise UserError(f"{file.path} has {len(header)} columns; expected a number from 1 to that, not {name}")
            if header[int(name) - 1].lower() in (*tables.HEADER, "content"):
                what = f"{file.path} begins with a header ({', '.join(header)})"
                raise UserError(f"{what}, and numbers of columns are for files without one; name the column")
            indices.append(int(name) - 1)
            continue
        if name not in header:
            raise no_column(file.path, name, header)
        if header.count(name) > 1:
            raise UserError(f"{file.path}:1 has the column '{name}' twice; rename or remove one")
        indices.append(header.index(name))
    return indices


def _check_header(file: File, header: list[str], delimiter: str) -> None:
    """Raises UserError if the first row is JSON, or its only cell is several between other characters."""
    if header and header[0].startswith(("{", "[")):
        raise UserError(f"{file.path} has JSON in its first line; expected names of columns; use jsonl:GLOB#field")
    if len(header) != 1:
        return
    others = _SEPARATORS | {character: (name, _CONVERT) for character, name in _OTHERS.items()}
    for character, (name, remedy) in others.items():
        if character != delimiter and character in header[0]:
            what = f"{file.path} has {name} between its columns, as its first line shows"
            raise UserError(f"{what}; expected {_SEPARATORS[delimiter][0]}; {remedy}")


def _rows(
    file: File, text: BinaryIO, counts: Counter[str], start: int, end: int, delimiter: str, encoding: str
) -> Iterator[tuple[int, Callable[[int], str], list[str]]]:
    """Reads the rows that begin in a range, as (key, what names a row by its key, cells)."""
    if delimiter == "\t" and not _has_quotes(file, delimiter, encoding):
        name = functools.partial(plain.line_name, file, encoding=encoding)
        return ((offset, name, row) for offset, row in _tab_rows(text, counts, start, end))
    return (
        (line, functools.partial("{}:{}".format, file.path), row)
        for line, row in _quoted_rows(file, text, counts, delimiter)
    )


def _tab_rows(text: BinaryIO, counts: Counter[str], start: int, end: int) -> Iterator[tuple[int, list[str]]]:
    begin = start
    for line in text:
        offset, begin = begin, begin + len(line)
        if offset >= end:
            return
        row = decode(line, counts).removesuffix("\n").removesuffix("\r")
        row = row if offset else row.removeprefix("\ufeff")
        if row:
            yield offset, row.split("\t")


def _quoted_rows(file: File, text: BinaryIO, counts: Counter[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Reads (number of the line where the row begins, cells) of the rows that are not blank."""
    csv.field_size_limit(tables.FIELD_CHARS)
    reader = csv.reader(_lines(text, counts), delimiter=delimiter, strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as e:
        reason = "a quoted text does not end" if "end of data" in str(e) or "limit" in str(e) else str(e)
        what = f"{file.path}:{line} is no row of CSV: {reason}"
        raise UserError(f"{what}; quote each text that holds quotes or newlines, and double the quotes in it") from e


def _lines(text: BinaryIO, counts: Counter[str]) -> Iterator[str]:
    rest = ""
    for block in blocks(text, counts):
        lines = io.StringIO(rest + block, newline="").readlines()
        rest = "" if not lines or lines[-1].endswith("\n") else lines.pop()
        if len(rest) > tables.FIELD_CHARS:
            raise csv.Error(f"its line is longer than the limit, {tables.FIELD_CHARS:,} characters")
        yield from lines
    if rest:
        yield rest


def _has_quotes(file: File, delimiter: str, encoding: str) -> bool:
    """Returns whether the quotes of a table with tabs enclose cells, which the beginning of the file decides."""
    with file.reading() as raw:
        head = opened(file.path, raw, encoding, Counter()).read(_HEAD_BYTES + 1)
    is_whole = len(head) <= _HEAD_BYTES
    lines = head if is_whole else head[: head.rfind(b"\n") + 1]
    return tables.quotes_cells(decode(lines, Counter()).removeprefix("\ufeff"), is_whole)
