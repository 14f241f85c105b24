"""Tokenising and packing a source unit by unit.

Each finished unit leaves its shards in the corpus folder and a file UNIT.json with their entries for corpus.json, so
that a killed `prepare` continues with the next unit.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flax_mlm.config.schema import DataConfig
from flax_mlm.data.corpus import COUNTS, SPLITS
from flax_mlm.data.held_out import hashed
from flax_mlm.data.packing import SpecialIds
from flax_mlm.data.sources import TextChunk
from flax_mlm.data.tokenizer.load import load_tokenizer
from flax_mlm.data.workers import Tokenised, tokenise
from flax_mlm.data.writer import write_shard
from flax_mlm.storage import files

JOB_CHARS = 1 << 20  # that a worker tokenises at a time


def make_units(
    chunks: Iterable[TextChunk],
    folder: Path,
    finished: Path,
    tokenizer_path: Path,
    data: DataConfig,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Tokenises, packs and writes the units that are not finished yet.

    Args:
      chunks: all chunks of the source.
      folder: where the shards are written.
      finished: folder of the files UNIT.json.

    Returns:
      The `splits` of corpus.json.
    """
    folder.mkdir(exist_ok=True)
    finished.mkdir(exist_ok=True)
    units = {int(file.stem): json.loads(file.read_text()) for file in finished.glob("*.json")}
    if units:
        log(f"tokenising: {len(units)} units were finished before and are reused")
    tokenizer = load_tokenizer(tokenizer_path)
    special_ids = SpecialIds(tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id)
    jobs = (job for job in make_jobs(chunks) if job[0].unit not in units)
    results = tokenise(jobs, tokenizer_path, data.num_workers)
    for unit, group in itertools.groupby(results, lambda result: result[0][0].unit):
        ids, table, hashes = _joined(group)
        is_held_out = hashes < data.validation_fraction
        units[unit] = {}
        for split, chosen in zip(SPLITS, (~is_held_out, is_held_out), strict=True):
            tokens = ids[np.repeat(chosen, table[:, 1])]
            file = folder / f"{split}-{unit:05d}.npy"
            units[unit][split] = write_shard(file, tokens, table[chosen], data.seq_len, special_ids, data.packing)
        files.write_json(finished / f"{unit:05d}.json", units[unit])
    return {split: join_entries([units[unit][split] for unit in sorted(units)]) for split in SPLITS}


def make_jobs(chunks: Iterable[TextChunk]) -> Iterator[list[TextChunk]]:
    """Groups chunks into jobs of about `JOB_CHARS`, none of which crosses the end of a unit; sets their hashes."""
    for _, group in itertools.groupby(hashed(chunks), lambda chunk: chunk.unit):
        job: list[TextChunk] = []
        size = 0
        for chunk in group:
            job.append(chunk)
            size += len(chunk.text)
            if size >= JOB_CHARS:
                yield job
                job, size = [], 0
        if job:
            yield job


def _joined(results: Iterable[Tokenised]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joins jobs: ids (T,), the table of `write_shard` (C, 4), and the hash of each chunk's document (C,)."""
    jobs, ids, sizes = zip(*results, strict=True)
    chunks = list(itertools.chain(*jobs))
    documents = np.array([chunk.document for chunk in chunks], np.int64)
    table = np.column_stack([documents, np.concatenate(sizes)])
    return np.concatenate(ids), table, np.array([chunk.hash for chunk in chunks])


def join_entries(units: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the entries of a split's units in corpus.json."""
    shards = [shard for unit in units for shard in unit["shards"]]
    return {**{key: sum(unit[key] for unit in units) for key in COUNTS}, "shards": shards}
