"""Tokenising, packing and writing a source unit by unit.

Each finished unit leaves its shards in the corpus folder and a file UNIT.json with their entries for corpus.json, so
that a killed `prepare` continues with the next unit. Other processes tokenise.
"""

import concurrent.futures
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from flax_mlm.config.schema import DataConfig
from flax_mlm.data.corpus import COUNTS, SPLITS, row_dtype
from flax_mlm.data.packing import pack
from flax_mlm.data.sources import TextChunk
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.errors import UserError
from flax_mlm.storage import files

JOB_CHARS = 1 << 20  # that a worker tokenises at a time

# The C chunks of a job; ids (T,) of `row_dtype`; int64 (C, 3) number of tokens, words and bytes in each chunk.
Tokenised: TypeAlias = tuple[list[TextChunk], np.ndarray, np.ndarray]


def make_units(
    chunks: Iterable[TextChunk], work: Path, tokenizer: Tokenizer, data: DataConfig, log: Callable[[str], None]
) -> tuple[dict[str, Any], Counter[str]]:
    """Tokenises, packs and writes the units that are not finished yet.

    Args:
      chunks: all chunks of the source.
      work: folder with `tokenizer`, which holds the file of this one; the shards are written to `corpus` in it, and
        the files UNIT.json to `units`.

    Returns:
      The `splits` of corpus.json, and the number of unknown tokens in each file of text.
    """
    folder, finished = work / "corpus", work / "units"
    folder.mkdir(exist_ok=True)
    finished.mkdir(exist_ok=True)
    units = {int(file.stem): json.loads(file.read_text()) for file in finished.glob("*.json")}
    if units:
        log(f"tokenising: {len(units)} units were finished before and are reused")
    jobs = (job for job in make_jobs(chunks) if job[0].unit not in units)
    results = _tokenise(jobs, work / "tokenizer", data.num_workers or os.cpu_count() or 1)
    for unit, group in itertools.groupby(results, lambda result: result[0][0].unit):
        unit_chunks, ids, table = _joined(group)
        is_held_out = np.array([chunk.hash for chunk in unit_chunks]) < data.validation_fraction
        units[unit] = {"unknown": _unknown_tokens(unit_chunks, ids, table[:, 1], tokenizer.unk_id)}
        for split, chosen in zip(SPLITS, (~is_held_out, is_held_out), strict=True):
            tokens = ids[np.repeat(chosen, table[:, 1])]
            file = folder / f"{split}-{unit:05d}.npy"
            units[unit][split] = write_shard(file, tokens, table[chosen], data.seq_len, tokenizer, data.packing)
        files.write_json(finished / f"{unit:05d}.json", units[unit])
    splits = {split: join_entries([units[unit][split] for unit in sorted(units)]) for split in SPLITS}
    return splits, sum((Counter(unit["unknown"]) for unit in units.values()), Counter())


def _joined(results: Iterable[Tokenised]) -> tuple[list[TextChunk], np.ndarray, np.ndarray]:
    """Joins jobs: the chunks, ids (T,), and the table of `write_shard` (C, 4)."""
    jobs, ids, sizes = zip(*results, strict=True)
    chunks = list(itertools.chain(*jobs))
    table = np.column_stack([np.array([chunk.document for chunk in chunks], np.int64), np.concatenate(sizes)])
    return chunks, np.concatenate(ids), table


def _unknown_tokens(chunks: list[TextChunk], ids: np.ndarray, num_tokens_C: np.ndarray, unk_id: int) -> dict[str, int]:
    """Counts the unknown tokens of each file that has some."""
    ends_C = np.cumsum(num_tokens_C)
    totals = np.cumsum(np.append(0, ids == unk_id))
    by_file = Counter[str]()
    for chunk, number in zip(chunks, (totals[ends_C] - totals[ends_C - num_tokens_C]).tolist(), strict=True):
        by_file[chunk.file] += number
    return dict(+by_file)


def make_jobs(chunks: Iterable[TextChunk]) -> Iterator[list[TextChunk]]:
    """Groups chunks into jobs of about `JOB_CHARS`, none of which crosses the end of a unit."""
    job: list[TextChunk] = []
    size = 0
    for chunk in chunks:
        if job and (size >= JOB_CHARS or chunk.unit != job[0].unit):
            yield job
            job, size = [], 0
        job.append(chunk)
        size += len(chunk.text)
    if job:
        yield job


def write_shard(
    file: Path, ids: np.ndarray, table: np.ndarray, seq_len: int, tokenizer: Tokenizer, packing: str
) -> dict[str, Any]:
    """Packs documents into a shard.

    Args:
      file: the .npy file; its checksums go into a .crc32.npy file beside it.
      ids: (T,) tokens of all documents, of `row_dtype`.
      table: int64 (C, 4), a row per chunk: number of its document, tokens, words, bytes of text. The chunks of a
        document follow one another.
      tokenizer: has the ids of special tokens.

    Returns:
      The counts and the shard, as a split has them in corpus.json; no shard of no chunks.
    """
    if not len(table):
        return {**dict.fromkeys(COUNTS, 0), "shards": []}
    documents, first = np.unique(table[:, 0], return_index=True)
    rows = pack(ids, np.add.reduceat(table[:, 1], first), seq_len, tokenizer, packing)
    crc32 = np.array([zlib.crc32(row) for row in rows], np.uint32)
    shard = {"rows": len(rows), **_save(file, rows), "crc32": _save(file.with_suffix(".crc32.npy"), crc32)}
    counts = [len(rows), len(documents), *table[:, 1:].sum(axis=0).tolist(), int((rows == tokenizer.pad_id).sum())]
    return {**dict(zip(COUNTS, counts, strict=True)), "shards": [shard]}


def _save(file: Path, array: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.save(buffer, array)
    data = buffer.getbuffer()
    files.write_bytes(file, data)
    return {"file": file.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def join_entries(units: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the entries of a split's units in corpus.json."""
    shards = [shard for unit in units for shard in unit["shards"]]
    return {**{key: sum(unit[key] for unit in units) for key in COUNTS}, "shards": shards}


def _tokenise(jobs: Iterable[list[TextChunk]], tokenizer_path: Path, num_workers: int) -> Iterator[Tokenised]:
    """Tokenises jobs in other processes, in order. Raises UserError if one of them was killed."""
    # Spawned, not forked: this process may run threads of JAX or TensorFlow.
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, spawn, _start_worker, (tokenizer_path,))
    pending: deque[tuple[list[TextChunk], concurrent.futures.Future[tuple[np.ndarray, np.ndarray]]]] = deque()
    try:
        for job in jobs:
            pending.append((job, pool.submit(_tokenise_texts, [chunk.text for chunk in job])))
            if len(pending) > 2 * num_workers:
                first, future = pending.popleft()
                yield first, *future.result()
        for last, future in pending:
            yield last, *future.result()
    except concurrent.futures.BrokenExecutor as e:
        raise UserError("a worker was killed, perhaps for lack of memory; lower data.num_workers and run again") from e
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_path: Path) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process per core already
    _worker_tokenizer = load_tokenizer(tokenizer_path)
    _worker_tokenizer.num_threads = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this process when its parent is killed, which workers of a pool outlive otherwise."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _tokenise_texts(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    ids = _worker_tokenizer.encode(texts)
    sizes = [[len(i), len(text.split()), len(text.encode())] for text, i in zip(texts, ids, strict=True)]
    return np.concatenate(ids).astype(row_dtype(_worker_tokenizer.vocab_size)), np.array(sizes, np.int64)
