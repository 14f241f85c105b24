"""Writing a corpus: packed shards, and corpus.json."""

import hashlib
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from flax_mlm.data.corpus import COUNTS, MANIFEST
from flax_mlm.data.packing import SpecialIds, pack
from flax_mlm.storage import files


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes corpus.json, with its own checksum in it."""
    sealed = {**manifest, "sha256": files.digest(manifest)}
    files.write_bytes(folder / MANIFEST, json.dumps(sealed, indent=1).encode())


def write_shard(
    file: Path, ids: np.ndarray, table: np.ndarray, seq_len: int, special_ids: SpecialIds, packing: str
) -> dict[str, Any]:
    """Packs documents into a shard.

    Args:
      file: the .npy file; its checksums go into a .crc32.npy file beside it.
      ids: (T,) tokens of all documents, of `row_dtype`.
      table: int64 (C, 4), a row per chunk: number of its document, tokens, words, bytes of text. The chunks of a
        document follow one another.

    Returns:
      The counts and the shard, as a split has them in corpus.json; no shard of no chunks.
    """
    if not len(table):
        return {**dict.fromkeys(COUNTS, 0), "shards": []}
    documents, first = np.unique(table[:, 0], return_index=True)
    rows = pack(ids, np.add.reduceat(table[:, 1], first), seq_len, special_ids, packing)
    crc32 = np.array([zlib.crc32(row) for row in rows], np.uint32)
    shard = {"rows": len(rows), **_save(file, rows), "crc32": _save(file.with_suffix(".crc32.npy"), crc32)}
    columns = table[:, 1:].sum(axis=0).tolist()
    counts = [len(rows), len(documents), *columns, int((rows == special_ids.pad).sum())]
    return {**dict(zip(COUNTS, counts, strict=True)), "shards": [shard]}


def _save(file: Path, array: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.save(buffer, array)
    data = buffer.getbuffer()
    files.write_bytes(file, data)
    return {"file": file.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
