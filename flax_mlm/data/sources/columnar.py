"""Documents from columns of Parquet and Arrow files.

Parquet is read by row groups, and Arrow (a file or a stream of the IPC format, as Hugging Face datasets writes it) by
record batches. Only the columns that are needed are read, and of a row group no more than `_BATCH_BYTES` at a time.
"""

import contextlib
import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flax_mlm.data.sources import base
from flax_mlm.data.sources.base import Range
from flax_mlm.data.sources.columns import Columns, chosen, document_chunks, no_column
from flax_mlm.data.sources.files import File
from flax_mlm.data.text import decode, refuse_other
from flax_mlm.errors import UserError

_BATCH_BYTES = 1 << 23
_READ_BYTES = 1 << 20  # of a column, at a time
_ARROW = b"ARROW1"
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3  # kinds of messages in a stream


def columns_of(file: File, columns: Columns | None, is_parquet: bool) -> Columns:
    """Returns the columns; where none are named, the one that is clearly the text. Raises UserError."""
    if columns:
        return columns
    with (_parquet if is_parquet else _arrow)(file) as reader:
        schema = reader.schema_arrow if is_parquet else reader.schema
        texts = [field.name for field in schema if _is_text(field.type) and not _is_binary(field.type)]
        return chosen(columns, file.path, schema.names, texts)


def parquet_ranges(file: File, columns: Columns) -> Iterator[Range]:
    """Divides a Parquet file between row groups. Raises UserError if it is damaged or lacks a column."""
    with _parquet(file) as reader:
        leaves = {".".join(path) for path in find_paths(file.path, reader.schema_arrow, columns)}
        indices = [i for i in range(len(reader.schema)) if reader.schema.column(i).path in leaves]
        groups = map(reader.metadata.row_group, range(reader.num_row_groups))
        sizes = [sum(group.column(i).total_uncompressed_size for i in indices) for group in groups]
    yield from _ranges(file, sizes, functools.partial(_read_parquet, file, columns))


def arrow_ranges(file: File, columns: Columns) -> Iterator[Range]:
    """Divides an Arrow file between record batches. Raises UserError if it is damaged or lacks a column."""
    with _arrow(file) as reader:
        find_paths(file.path, reader.schema, columns)
        is_file = hasattr(reader, "num_record_batches")
        n = reader.num_record_batches if is_file else 0
        sizes = [file.size // max(1, n)] * n if is_file else []
    if is_file:
        yield from _ranges(file, sizes, functools.partial(_read_arrow_file, file, columns))
    elif offsets := _stream_offsets(file):
        sizes = [end - start for start, end in itertools.pairwise(offsets)]
        yield from _ranges(file, sizes, functools.partial(_read_arrow_stream, file, columns), offsets)
    else:
        yield Range(file.path, file.size, functools.partial(_read_whole_stream, file, columns))


def _ranges(file: File, sizes: list[int], read: Callable[..., Any], offsets: list[int] | None = None) -> list[Range]:
    """Makes ranges of consecutive groups, of at most `UNIT_BYTES` where a group is not larger itself.

    Args:
      sizes: of the groups.
      read: is given the numbers of the first group and of that after the last, or their offsets, and the counts.
    """
    bounds, size = [0], 0
    for number, each in enumerate(sizes):
        if number > bounds[-1] and size + each > base.UNIT_BYTES:
            bounds.append(number)
            size = 0
        size += each
    pairs = list(zip(bounds, [*bounds[1:], len(sizes)], strict=True))
    ranges = []
    for first, end in pairs:
        size = sum(sizes[first:end])
        given = (offsets[first], offsets[end]) if offsets else (first, end)
        reader = functools.partial(read, size, *given)
        ranges.append(Range(file.path, size, reader, first == 0, end == len(sizes)))
    return ranges


def _read_parquet(
    file: File, columns: Columns, size: int, first: int, end: int, counts: Counter[str]
) -> Iterator[tuple[int, str]]:
    with _parquet(file) as reader:
        schema = reader.schema_arrow
        paths = find_paths(file.path, schema, columns)
        rows = sum(reader.metadata.row_group(i).num_rows for i in range(first, end))
        batch_size = max(1, min(1 << 14, _BATCH_BYTES * rows // max(size, 1)))
        leaves = [".".join(path) for path in paths]
        groups = list(range(first, end))
        batches = reader.iter_batches(batch_size, groups, leaves, use_threads=False) if groups else ()
        yield from documents(columns, paths, batches, size / max(rows, 1), counts)


def _read_arrow_file(
    file: File, columns: Columns, size: int, first: int, end: int, counts: Counter[str]
) -> Iterator[tuple[int, str]]:
    with _arrow(file) as reader:
        paths = find_paths(file.path, reader.schema, columns)
        batches = (reader.get_batch(number) for number in range(first, end))
        yield from documents(columns, paths, batches, 0, counts)


def _read_arrow_stream(
    file: File, columns: Columns, size: int, start: int, end: int, counts: Counter[str]
) -> Iterator[tuple[int, str]]:
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        source.seek(start)
        while source.tell() < end:
            yield pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)

    with _arrow(file) as reader:
        schema = reader.schema
        paths = find_paths(file.path, schema, columns)
        with _mapped(file) as source:
            yield from documents(columns, paths, batches(), 0, counts)


def _read_whole_stream(file: File, columns: Columns, counts: Counter[str]) -> Iterator[tuple[int, str]]:
    with _arrow(file) as reader:
        yield from documents(columns, find_paths(file.path, reader.schema, columns), reader, 0, counts)


def _stream_offsets(file: File) -> list[int]:
    """Finds where the record batches of a stream begin, and where the last one ends, without reading them; none if it
    has dictionaries, which are read from the start. Raises UserError if it ends early."""
    offsets: list[int] = []
    with file.reading() as raw:
        while True:
            begin = raw.tell()
            head = raw.read(8)
            size = int.from_bytes(head[4:], "little")
            if not size:  # the mark of the end, or none
                return [*offsets, begin]
            kind, body = _message(raw.read(size))
            if kind == _DICTIONARY_BATCH:
                return []
            if kind == _RECORD_BATCH:
                offsets.append(begin)
            if begin + len(head) + size + body > file.size:
                raise UserError(f"{file.path} is an incomplete Arrow file: {file.size:,} bytes; copy it again")
            raw.seek(body, os.SEEK_CUR)


def _message(metadata: bytes) -> tuple[int, int]:
    """Reads the kind of a message, and the size of what follows its metadata, which are a table of FlatBuffers."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(metadata[at : at + size], "little", signed=size == 4)

    table = number(0, 4)
    entries = table - number(table, 4)  # where the table's fields are, two bytes for each

    def field(index: int, size: int) -> int:
        at = 4 + 2 * index
        offset = number(entries + at, 2) if at < number(entries, 2) else 0
        return number(table + offset, size) if offset else 0

    return field(1, 1), field(3, 8)


def documents(
    columns: Columns, paths: list[list[str]], batches: Iterable[Any], bytes_per_row: float, counts: Counter[str]
) -> Iterator[tuple[int, str]]:
    """Reads documents from record batches; the key of each is the number of its row."""
    start, row = counts["read"], 0
    for each in batches:
        batch = each.select(list(dict.fromkeys(path[0] for path in paths)))
        rows_at_once = max(1, min(1 << 14, _BATCH_BYTES * batch.num_rows // max(batch.nbytes, 1)))
        for first in range(0, batch.num_rows, rows_at_once):
            part = batch.slice(first, rows_at_once)
            values = [_values(part.column(path[0]), path[1:], counts) for path in paths]
            for record in zip(*values, strict=True):
                text = columns.document(record, counts)
                if text is not None:
                    for chunk in document_chunks(text, counts):
                        yield row, chunk
                row += 1
            counts["read"] = start + int(row * bytes_per_row)


def _values(array: Any, path: list[str], counts: Counter[str]) -> list[str | None]:
    """Converts text to strings; what a damaged file says of its size is checked before it is followed."""
    import pyarrow as pa
    import pyarrow.compute

    array.validate()
    if path:
        array = pyarrow.compute.struct_field(array, path)
    if pa.types.is_dictionary(array.type):
        array = _binary(array.dictionary).take(array.indices)
    if pa.types.is_null(array.type):
        return [None] * len(array)
    return [None if value is None else decode(value, counts) for value in _binary(array).to_pylist()]


def _binary(array: Any) -> Any:
    """Casts text to bytes, which may be no UTF-8."""
    import pyarrow as pa

    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array = array.cast(pa.binary() if pa.types.is_string(array.type) else pa.large_binary())
    array.validate(full=True)
    return array if pa.types.is_binary(array.type) else array.cast(pa.large_binary())


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return is_text or _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def find_paths(where: str, schema: Any, columns: Columns) -> list[list[str]]:
    """Finds the columns: for each the names of its fields, from outside in. Raises UserError."""
    import pyarrow as pa

    paths = []
    for name in columns.names:
        fields = _find(list(schema), name)
        if not fields:
            raise no_column(where, name, _leaves(schema))
        if schema.names.count(fields[0].name) > 1:
            raise UserError(f"{where} has the column '{fields[0].name}' twice; rename or remove one")
        kind = fields[-1].type
        if not _is_text(kind) and not pa.types.is_null(kind):
            remedy = f"name one of its fields, as in {name}.{kind[0].name}" if pa.types.is_struct(kind) else ""
            remedy = remedy or "name a column of text"
            raise UserError(f"{where} has a column '{name}' of {kind}; expected text (string or binary); {remedy}")
        paths.append([field.name for field in fields])
    return paths


def _find(fields: list[Any], name: str) -> list[Any]:
    import pyarrow as pa

    for field in fields:
        if field.name == name:
            return [field]
    for field in fields:
        if name.startswith(field.name + ".") and pa.types.is_struct(field.type):
            inner = [field.type[i] for i in range(field.type.num_fields)]
            if found := _find(inner, name[len(field.name) + 1 :]):
                return [field, *found]
    return []


def _leaves(fields: Iterable[Any], prefix: str = "") -> list[str]:
    """Names the columns, with the fields of nested ones."""
    import pyarrow as pa

    names = []
    for field in fields:
        if pa.types.is_struct(field.type):
            names += _leaves([field.type[i] for i in range(field.type.num_fields)], f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


@contextlib.contextmanager
def _parquet(file: File) -> Iterator[Any]:
    import pyarrow.parquet

    with file.reading() as raw, _errors(file, "Parquet"):
        head = raw.peek(512)  # type: ignore[attr-defined]
        if not head.startswith(b"PAR1"):
            _refuse(file, head, "Parquet")
        with pyarrow.parquet.ParquetFile(
            raw, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True
        ) as reader:
            yield reader


@contextlib.contextmanager
def _arrow(file: File) -> Iterator[Any]:
    """Opens a reader of a file or a stream."""
    import pyarrow as pa

    with _errors(file, "Arrow"):
        with file.reading() as raw:
            head = raw.peek(512)  # type: ignore[attr-defined]
        if not head.startswith((_ARROW, b"\xff\xff\xff\xff")):
            _refuse(file, head, "Arrow")
        with _mapped(file) as source:
            is_file = head.startswith(_ARROW)
            with pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source) as reader:
                yield reader


@contextlib.contextmanager
def _mapped(file: File) -> Iterator[Any]:
    """Opens a file for pyarrow, as a map of the memory where it is on this machine."""
    import pyarrow as pa

    if os.path.exists(file.path):
        with pa.memory_map(file.path) as source:
            yield source
    else:
        with file.reading() as raw:
            yield pa.PythonFile(raw, "r")


def _refuse(file: File, head: bytes, kind: str) -> None:
    refuse_other(file.path, head, f"{kind} format", unless=kind)
    known = "; for files of text use text:, csv: or jsonl:" if b"\0" not in head else ""
    what = "is empty" if not head else f"is no {kind} file, as its first bytes show"
    raise UserError(f"{file.path} {what}; expected {kind} format{known}")


@contextlib.contextmanager
def _errors(file: File, kind: str) -> Iterator[None]:
    """Turns pyarrow's errors into a UserError that names the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as e:
        first = str(e).partition("\n")[0].partition(". ")[0]
        what = f"{file.path} is a damaged or incomplete {kind} file: {first}"
        raise UserError(f"{what}; copy it again, or make it again") from e
