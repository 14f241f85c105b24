"""Documents from datasets of Hugging Face: of the hub, of the cache of `datasets`, and of folders that it has saved.

What is on this machine is read by ranges of rows. A dataset of the hub is read as it arrives, without a copy on disk:
by data files, and Parquet by groups of row groups. The commit, or the fingerprint of a folder, is part of the source's
version.
"""

import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from flax_mlm.data.sources import base, columnar
from flax_mlm.data.sources import hugging_face_hub as hub
from flax_mlm.data.sources.base import Range, Source, grouped
from flax_mlm.data.sources.columns import Columns, chosen, parse
from flax_mlm.errors import UserError

_EXPECTED = "hf:ORG/NAME?config=...&split=...&revision=...#column, or hf:FOLDER#column"
_KEYS = ("config", "split", "revision")
_BATCH_BYTES = 1 << 22  # of rows that are in memory at a time, about
_BATCH_ROWS = 64


class _Spec(NamedTuple):
    """Names in `data.source`; empty where it has none."""

    text: str  # all of it, for errors
    dataset: str
    config: str
    split: str
    revision: str
    column: str

    def error(self, what: str) -> UserError:
        return UserError(f"data.source is '{self.text}'; {what}")


def open_hf(spec: str, rest: str) -> Source:
    """Opens ORG/NAME[?config=...&split=...&revision=...][#column], or FOLDER[?split=...][#column].

    Raises:
      UserError: `datasets` is not installed, or there is no such dataset, config, split, revision or column.
    """
    names = _parse(spec, rest)
    hub.library()
    folder = Path(names.dataset).expanduser()
    if folder.is_dir():
        return _open_saved(names, folder)
    if not hub.is_name(names.dataset):
        raise names.error(f"'{names.dataset}' is no folder (from {os.getcwd()}); expected {_EXPECTED}")
    if hub.is_offline():
        return _open_cached(names, hub.find_cached(spec, names.dataset, names.config, names.revision))
    return _open_hub(names)


def _parse(spec: str, rest: str) -> _Spec:
    if os.path.isdir(os.path.expanduser(rest)):
        return _Spec(spec, rest, "", "", "", "")
    name, _, column = rest.partition("#")
    name, _, query = name.partition("?")
    values: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in _KEYS or not value:
            raise UserError(f"data.source is '{spec}'; '{part}' is none of {', '.join(_KEYS)}; expected {_EXPECTED}")
        values[key] = unquote(value)
    config, split, revision = (values.get(key, "") for key in _KEYS)
    return _Spec(spec, name, config, split, revision, column)


def _columns(names: _Spec, schema: Any) -> tuple[Columns, list[str]]:
    """Returns the columns of the text, and those at the top level that they are in. Raises UserError."""
    import pyarrow as pa

    texts = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    columns = chosen(parse(names.text, names.column), names.dataset, schema.names, texts)
    paths = columnar.find_paths(names.dataset, schema, columns)
    return columns, list(dict.fromkeys(path[0] for path in paths))


def _choose_split(names: _Spec, splits: Iterable[str]) -> str:
    known = [str(split) for split in splits]
    if (split := names.split or "train") not in known:
        remedy = f"name one: {names.dataset}?split={known[0] if known else 'SPLIT'}"
        raise names.error(f"it has no split '{split}'; it has {', '.join(known) or 'none'}; {remedy}")
    return split


# ---- folders and the cache: rows in memory-mapped files


class _Rows(NamedTuple):
    """A split on this machine."""

    spec: str
    folder: Path
    split: str  # empty: the folder is the split


def _open_saved(names: _Spec, folder: Path) -> Source:
    """Opens what `save_to_disk` has written."""
    if names.config or names.revision:
        raise names.error(f"{folder} is a folder, which has no config and no revision")
    known = _read_json(names, folder / "dataset_dict.json").get("splits")
    if known is not None:
        folder /= _choose_split(names, known)
    state = _read_json(names, folder / "state.json")
    if not state:
        how = "write its files as parquet:GLOB#column, arrow:GLOB#column or jsonl:GLOB#field"
        raise names.error(f"{folder} is no folder made by save_to_disk; {how}")
    if known is None and names.split not in ("", own := str(state.get("_split") or "")):
        raise names.error(f"{folder} is one split{f', {own}' * bool(own)}; leave split={names.split} out")
    files = [folder / each["filename"] for each in state["_data_files"]]
    with hub.naming(names.text):
        sizes = [file.stat().st_size for file in files]
    version = [state["_fingerprint"], sizes]
    return _of_rows(names, _Rows(names.text, folder.absolute(), ""), f"{names.dataset} (folder of datasets)", version)


def _read_json(names: _Spec, file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    with hub.naming(names.text):
        return json.loads(file.read_text())


def _open_cached(names: _Spec, cached: hub.Cached) -> Source:
    with hub.naming(names.text):
        splits = hub.open_cached(cached.folder).info.splits
    split = _choose_split(names, splits)
    name = f"{names.dataset} ({cached.config}, {split}) at {cached.commit[:12]} (cache of datasets)"
    version = [names.dataset, cached.config, split, cached.commit]
    return _of_rows(names, _Rows(names.text, cached.folder, split), name, version)


def _of_rows(names: _Spec, rows: _Rows, name: str, version: list[Any]) -> Source:
    dataset = _dataset(rows)
    columns, top = _columns(names, dataset.features.arrow_schema)
    divided = list(_row_ranges(dataset.select_columns(top).data.table.to_batches()))
    ranges = [
        Range("", size, functools.partial(_read_rows, rows, columns, top, start, stop, size))
        for start, stop, size in divided
    ]
    licence = dataset.info.license or "not stated; that of the dataset"
    return Source(
        name, licence, ["hf rows", *version, columns.parts, [stop for _, stop, _ in divided]], grouped(ranges)
    )


def _row_ranges(batches: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """Divides batches of rows into ranges of at most about `UNIT_BYTES`: (first row, last + 1, bytes)."""
    start = stop = size = 0
    for batch in batches:
        parts = max(1, -(-batch.nbytes // base.UNIT_BYTES))
        for part in range(parts):
            rows = batch.num_rows * (part + 1) // parts - batch.num_rows * part // parts
            if size and size + batch.nbytes // parts > base.UNIT_BYTES:
                yield start, stop, size
                start, size = stop, 0
            stop, size = stop + rows, size + batch.nbytes // parts
    if stop > start:
        yield start, stop, size


@functools.cache
def _dataset(rows: _Rows) -> Any:
    with hub.naming(rows.spec):
        if rows.split:
            return hub.open_cached(rows.folder).as_dataset(rows.split)
        return hub.library().load_from_disk(str(rows.folder))


def _read_rows(
    rows: _Rows, columns: Columns, top: list[str], start: int, stop: int, size: int, counts: Counter[str]
) -> Iterator[tuple[int, str]]:
    step = max(1, (stop - start) * _BATCH_BYTES // max(size, 1))
    with hub.naming(rows.spec):
        dataset = _dataset(rows).select_columns(top).with_format("arrow")
        tables = (dataset[first : min(first + step, stop)] for first in range(start, stop, step))
        yield from _documents(rows.spec, columns, tables, size / (stop - start), counts)


def _documents(
    spec: str, columns: Columns, tables: Iterable[Any], bytes_per_row: float, counts: Counter[str]
) -> Iterator[tuple[int, str]]:
    first = next(tables := iter(tables), None)
    if first is not None:
        paths = columnar.find_paths(spec, first.schema, columns)
        batches = (batch for table in itertools.chain([first], tables) for batch in table.to_batches())
        yield from columnar.documents(columns, paths, batches, bytes_per_row, counts)


# ---- the hub: data files as they arrive


class _Stream(NamedTuple):
    """A split on the hub."""

    spec: str
    dataset: str
    config: str
    split: str
    commit: str


class _Part(NamedTuple):
    """A part of a data file."""

    file: int
    num_files: int
    part: int
    num_parts: int


def _open_hub(names: _Spec) -> Source:
    about = hub.resolve(names.text, names.dataset, names.revision)
    builder = hub.open_config(names.text, names.dataset, names.config, about.commit)
    config = builder.config.name
    if os.path.isdir(builder.cache_dir):
        return _open_cached(names, hub.Cached(config, about.commit, Path(builder.cache_dir)))
    with hub.naming(names.text):
        splits = builder.as_streaming_dataset()
    split = _choose_split(names, splits)
    with hub.naming(names.text):
        dataset = splits[split]
        known = dataset.features
        schema = known.arrow_schema if known else next(dataset.with_format("arrow").iter(1)).schema
        num_files, files = dataset.num_shards, list(builder.config.data_files[split])
        sizes = hub.sizes(files)
    columns, top = _columns(names, schema)
    if len(files) != num_files:  # archives, whose files are read one by one
        files, sizes = [""] * num_files, [max(1, sum(sizes) // max(num_files, 1))] * num_files
    stream = _Stream(names.text, names.dataset, config, split, about.commit)
    ranges: list[Range] = []
    for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
        parts = max(1, -(-size // base.UNIT_BYTES)) if hub.is_parquet(builder) else 1
        for part in range(parts):
            own = size * (part + 1) // parts - size * part // parts
            read = functools.partial(_read_stream, stream, columns, top, _Part(number, num_files, part, parts), own)
            ranges.append(Range(file, own, read, part == 0, part == parts - 1))
    name = f"{names.dataset} ({config}, {split}) at {about.commit[:12]} (Hugging Face)"
    return Source(name, about.licence, ["hf files", *stream[1:], columns.parts, len(ranges)], grouped(ranges))


@functools.cache
def _streaming(stream: _Stream, top: tuple[str, ...]) -> Any:
    builder = hub.builder(stream.dataset, stream.config, stream.commit)
    if hub.is_parquet(builder):  # asks the hub for these columns only
        builder.config.columns, builder.config.batch_size = list(top), _BATCH_ROWS
    return builder.as_streaming_dataset(stream.split).select_columns(list(top)).with_format("arrow")


def _read_stream(
    stream: _Stream, columns: Columns, top: list[str], part: _Part, size: int, counts: Counter[str]
) -> Iterator[tuple[int, str]]:
    """Reads a data file, or of its P row groups those from P * part / num_parts to P * (part + 1) / num_parts."""
    read, end = counts["read"], counts["read"] + size
    with hub.naming(stream.spec):
        file = _streaming(stream, tuple(top)).shard(part.num_files, part.file)
        shards = [file]
        if part.num_parts > 1:
            groups = file.reshard()
            first, last = (groups.num_shards * p // part.num_parts for p in (part.part, part.part + 1))
            shards = [groups.shard(groups.num_shards, group) for group in range(first, last)]
        tables = (table for shard in shards for table in shard.iter(_BATCH_ROWS))
        for row, chunk in _documents(stream.spec, columns, tables, 0, counts):
            read += len(chunk)
            counts["read"] = min(read, end)
            yield row, chunk
