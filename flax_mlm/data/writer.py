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
from flax_mlm.data.tokenizer.base import Tokenizer
from flax_mlm.storage import files

WINDOW = 1 << 23  # tokens that are packed together and make a shard


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes corpus.json, with its own checksum in it."""
    sealed = {**manifest, "sha256": files.digest(manifest)}
    files.write_bytes(folder / MANIFEST, json.dumps(sealed, indent=1).encode())


class Writer:
    """Packs the tokens of one split, a window at a time, and writes each window as a shard."""

    def __init__(self, folder: Path, split: str, seq_len: int, tokenizer: Tokenizer, packing: str):
        self.split = split
        self._folder, self._seq_len, self._packing = folder, seq_len, packing
        self._special_ids = SpecialIds(tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id)
        self._ids: list[np.ndarray] = []
        self._tables: list[np.ndarray] = []
        self._last_document = -1
        self._totals = dict.fromkeys(COUNTS, 0)
        self._shards: list[dict[str, Any]] = []

    def add(self, ids: np.ndarray, table: np.ndarray) -> None:
        """Takes documents in order, whole or in chunks.

        Args:
          ids: (T,) of `row_dtype`.
          table: int64 (C, 4), a row per chunk: number of its document, tokens, words, bytes of text.
        """
        self._ids.append(ids)
        self._tables.append(table)
        if sum(map(len, self._ids)) >= WINDOW:
            self._write()

    def finish(self) -> dict[str, Any]:
        """Writes what is left; returns the split's entry in corpus.json."""
        if any(map(len, self._tables)):
            self._write()
        return {**self._totals, "shards": self._shards}

    def _write(self) -> None:
        ids, table = np.concatenate(self._ids), np.concatenate(self._tables)
        self._ids, self._tables = [], []
        documents, first = np.unique(table[:, 0], return_index=True)
        lengths = np.add.reduceat(table[:, 1], first)  # the chunks of a document follow one another
        rows = pack(ids, lengths, self._seq_len, self._special_ids, self._packing)
        name = f"{self.split}-{len(self._shards):05d}"
        crc32 = np.array([zlib.crc32(row) for row in rows], np.uint32)
        entry = {"rows": len(rows), **self._save(f"{name}.npy", rows), "crc32": self._save(f"{name}.crc32.npy", crc32)}
        self._shards.append(entry)
        columns = table[:, 1:].sum(axis=0).tolist()
        more = len(documents) - int(documents[0] == self._last_document)
        padding = int((rows == self._special_ids.pad).sum())
        for key, n in zip(COUNTS, [len(rows), more, *columns, padding], strict=True):
            self._totals[key] += n
        self._last_document = int(documents[-1])

    def _save(self, name: str, array: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        np.save(buffer, array)
        data = buffer.getbuffer()
        files.write_bytes(self._folder / name, data)
        return {"file": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
