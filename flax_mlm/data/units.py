"""Tokenising, packing and writing a source unit by unit.

Each finished part of a unit leaves its shards and a record with their entries for corpus.json, so that a killed
`prepare` continues with the next one.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np

from flax_mlm.config.schema import DataConfig
from flax_mlm.data.corpus import COUNTS, SPLITS
from flax_mlm.data.packing import pack
from flax_mlm.data.sources.base import TextChunk, Unit
from flax_mlm.data.tokenising import Tokenised, make_jobs
from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.data.work import Work
from flax_mlm.storage import buckets, files
from flax_mlm.storage.gcs import AnyPath

Tokenise: TypeAlias = Callable[[Iterable[list[TextChunk]]], Iterator[Tokenised]]
Write: TypeAlias = Callable[[AnyPath, bytes | memoryview], None]


def make_units(
    units: Iterable[Unit],
    work: Work,
    tokenizer: Tokenizer,
    data: DataConfig,
    tokenise: Tokenise,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Tokenises, packs and writes units, except for what is finished already.

    The record of a unit has `parts`, how many there are, and `counts` and `by_file`, see `Unit.chunks`.

    Args:
      tokenise: maps jobs to their tokens, in order.
      progress: called with the number of bytes that have been read.
    """
    is_finished = functools.lru_cache(1)(lambda part_key: bool(work.part(*part_key)))  # one answer for a whole part
    reading = deque(_Reading(unit) for unit in units)
    jobs = (job for job in make_jobs(_chunks(tuple(reading), progress)) if not is_finished(job[0].part_key))
    for (unit, part), group in itertools.groupby(tokenise(jobs), lambda result: result[0][0].part_key):
        while reading[0].unit.number != unit:  # all of it has been read, and all its parts are finished
            work.finish(reading[0].unit.number, reading.popleft().record())
        work.finish_part(unit, part, _make_part(unit, part, group, work, tokenizer, data))
    for each in reading:
        work.finish(each.unit.number, each.record())


def _chunks(units: Iterable["_Reading"], progress: Callable[[int], None]) -> Iterator[TextChunk]:
    finished = 0
    for each in units:
        for chunk in each.chunks():
            progress(finished + each.counts["read"])
            yield chunk
        finished += each.unit.size


@dataclasses.dataclass
class _Reading:
    """A unit that is read."""

    unit: Unit
    parts: int = 0
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    by_file: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)

    def chunks(self) -> Iterator[TextChunk]:
        for chunk in self.unit.chunks(self.counts, self.by_file):
            self.parts = chunk.part + 1
            yield chunk

    def record(self) -> dict[str, Any]:
        return {"parts": self.parts, "counts": self.counts, "by_file": self.by_file}


def _make_part(
    unit: int, part: int, results: Iterable[Tokenised], work: Work, tokenizer: Tokenizer, data: DataConfig
) -> dict[str, Any]:
    """Packs and writes a part. Returns its record: for each split what `write_shard` returns, and `unknown`, the number
    of unknown tokens in each file of text."""
    unknown, ids, tables = _read(results, data.validation_fraction, tokenizer.unk_id)
    record: dict[str, Any] = {"unknown": unknown}
    for split in SPLITS:
        file = work.corpus / (f"{split}-{unit:05d}" + f"-{part:05d}" * bool(part) + ".npy")
        record[split] = write_shard(  # to which the joined ids belong
            file, _joined(ids[split]), _joined(tables[split]), data.seq_len, tokenizer, data.packing, work.write
        )
    return record


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over all units.

    Attributes:
      splits: as in corpus.json.
      counts, by_file: see `Unit.chunks`.
      unknown: file -> number of its unknown tokens.
    """

    splits: dict[str, Any]
    counts: Counter[str]
    by_file: dict[str, Counter[str]]
    unknown: Counter[str]

    @property
    def tokens_per_byte(self) -> float:
        """Tokens by bytes of text."""
        tokens, size = (sum(split[key] for split in self.splits.values()) for key in ("tokens", "bytes"))
        return tokens / max(size, 1)


def join(work: Work, num_units: int) -> Totals:
    """Sums the records of all units, which are finished."""
    records = [record or {} for record in buckets.together(work.finished, range(num_units), work.folder)]
    keys = [(unit, part) for unit, record in enumerate(records) for part in range(record["parts"])]
    parts = [part or {} for part in buckets.together(lambda key: work.part(*key), keys, work.folder)]
    splits = {split: join_entries([part[split] for part in parts]) for split in SPLITS}
    counts = _sum(record["counts"] for record in records)
    by_file = {kind: _sum(record["by_file"].get(kind, {}) for record in records) for kind in counts}
    return Totals(splits, counts, by_file, _sum(part["unknown"] for part in parts))


def _sum(counts: Iterable[dict[str, int]]) -> Counter[str]:
    total = Counter[str]()
    for each in counts:
        total.update(each)
    return total


def _read(
    results: Iterable[Tokenised], validation_fraction: float, unk_id: int
) -> tuple[dict[str, int], dict[str, list[np.ndarray]], dict[str, list[np.ndarray]]]:
    """Reads jobs, of which the text is not kept.

    Returns:
      unknown tokens of each file; for each split the ids (T,) and the table of `write_shard` (C, 4) of each job.
    """
    unknown = Counter[str]()
    all_ids: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    tables: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for chunks, ids, sizes in results:
        unknown.update(_unknown_tokens(chunks, ids, sizes[:, 0], unk_id))
        table = np.column_stack([np.array([chunk.document for chunk in chunks], np.int64), sizes])
        is_held_out = np.array([chunk.hash for chunk in chunks]) < validation_fraction
        for split, chosen in zip(SPLITS, (~is_held_out, is_held_out), strict=True):
            all_ids[split].append(ids[np.repeat(chosen, sizes[:, 0])])
            tables[split].append(table[chosen])
    return dict(unknown), all_ids, tables


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    """Concatenates arrays, and empties the list: they are as large again."""
    joined = np.concatenate(arrays)
    arrays.clear()
    return joined


def _unknown_tokens(chunks: list[TextChunk], ids: np.ndarray, num_tokens_C: np.ndarray, unk_id: int) -> dict[str, int]:
    """Counts the unknown tokens of each file that has some."""
    before_end_C = np.searchsorted(np.flatnonzero(ids == unk_id), np.cumsum(num_tokens_C))
    by_file = Counter[str]()
    for chunk, number in zip(chunks, np.diff(before_end_C, prepend=0).tolist(), strict=True):
        by_file[chunk.file] += number
    return dict(+by_file)


def write_shard(
    file: AnyPath,
    ids: np.ndarray,
    table: np.ndarray,
    seq_len: int,
    tokenizer: Tokenizer,
    packing: str,
    write: Write = files.write_bytes,
) -> dict[str, Any]:
    """Packs documents into a shard.

    Args:
      file: the .npy file; its checksums go into a .crc32.npy file beside it.
      ids: (T,) tokens of all documents, of `row_dtype`.
      table: int64 (C, 4), a row per chunk: number of its document, tokens, words, bytes of text. The chunks of a
        document follow one another.
      tokenizer: has the ids of special tokens.
      write: writes a file.

    Returns:
      The counts and the shard, as a split has them in corpus.json; no shard of no chunks.
    """
    if not len(table):
        return {**dict.fromkeys(COUNTS, 0), "shards": []}
    documents, first = np.unique(table[:, 0], return_index=True)
    rows = pack(ids, np.add.reduceat(table[:, 1], first), seq_len, tokenizer, packing)
    del ids  # the file's content is as large again
    crc32 = np.array([zlib.crc32(row) for row in rows], np.uint32)
    shard = {"rows": len(rows), **_save(file, rows, write)}
    shard["crc32"] = _save(file.with_suffix(".crc32.npy"), crc32, write)
    counts = [len(rows), len(documents), *table[:, 1:].sum(axis=0).tolist(), int((rows == tokenizer.pad_id).sum())]
    return {**dict(zip(COUNTS, counts, strict=True)), "shards": [shard]}


def _save(file: AnyPath, array: np.ndarray, write: Write) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.save(buffer, array)
    data = buffer.getbuffer()
    write(file, data)
    return {"file": file.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def join_entries(units: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the entries of a split's units in corpus.json."""
    shards = [shard for unit in units for shard in unit["shards"]]
    return {**{key: sum(unit[key] for unit in units) for key in COUNTS}, "shards": shards}
