"""The corpus on disk: a folder with corpus.json, the tokenizer's file, and .npy shards of fixed-length rows.

    corpus.json  tokenizer.model  train-00000.npy  train-00001.npy ...  validation-00000.npy ...

A shard is an array (rows, L), uint16 when the vocabulary fits and uint32 otherwise. Local shards are
memory-mapped; elsewhere (gs://) only the rows asked for are fetched.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from flax_mlm.data import packing as packing_lib
from flax_mlm.data import tokenizer as tokenizer_lib
from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.errors import UserError

FORMAT = 1  # raised whenever older readers would misread
MANIFEST = "corpus.json"
SPLITS = ("train", "validation")
_REMEDY = "copy the folder again, or delete it and prepare again"
WINDOW = 1 << 23  # tokens that are packed together and make a shard


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one split.

    Attributes:
      num_rows: N.
      seq_len: L.
      pad_id: What fills the end of a row.
    """

    num_rows: int
    seq_len: int
    pad_id: int
    _shards: tuple["_Shard", ...]

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Rows by their numbers, (n,) -> int32 (n, L). Only these are read."""
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.num_rows:
            raise IndexError(f"row {indices.min()} or {indices.max()} of a split of {self.num_rows}")
        out = np.empty((len(indices), self.seq_len), np.int32)
        starts = np.cumsum([0] + [s.rows for s in self._shards])
        shard = np.searchsorted(starts, indices, side="right") - 1
        for s in np.unique(shard):
            here = np.flatnonzero(shard == s)
            out[here] = self._shards[s].read(indices[here] - starts[s])
        return out


@dataclasses.dataclass(frozen=True)
class _Shard:
    path: epath.Path
    rows: int
    seq_len: int
    dtype: np.dtype
    size: int  # bytes, header included

    @functools.cached_property
    def _map(self) -> np.ndarray:
        return np.load(os.fspath(self.path), mmap_mode="r")

    def read(self, indices: np.ndarray) -> np.ndarray:
        return self._map[indices] if _is_local(self.path) else self._read_ranges(indices)

    def _read_ranges(self, indices: np.ndarray) -> np.ndarray:
        wanted, inverse = np.unique(indices, return_inverse=True)
        width = self.seq_len * self.dtype.itemsize
        header = self.size - self.rows * width
        with self.path.open("rb") as file:
            runs = []
            for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
                file.seek(header + int(run[0]) * width)
                runs.append(np.frombuffer(file.read(len(run) * width), self.dtype).reshape(-1, self.seq_len))
        return np.concatenate(runs)[inverse.reshape(-1)]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An open corpus.

    Attributes:
      path: Its folder.
      seq_len: L.
      vocab_size: V of its tokenizer.
      counts: split -> rows, documents, tokens (without special ones), words, bytes of text.
      source: What the documents are.
      licence: Of the text.
      fingerprint: Hash of everything that decides what is read: the same rows have the same one.
      manifest: All of corpus.json.
    """

    path: epath.Path
    seq_len: int
    vocab_size: int
    counts: dict[str, dict[str, int]]
    source: str
    licence: str
    fingerprint: str
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> "Corpus":
        """Opens a folder made by `prepare`, and checks that every file is there in its full size.

        Raises:
          UserError: it is not a corpus, of another format, incomplete, or its tokenizer is another one.
        """
        folder = epath.Path(path).expanduser()
        if not (folder / MANIFEST).exists():
            raise UserError(
                f"{folder} is not a corpus: it has no {MANIFEST}; make one with `python -m flax_mlm.prepare`"
            )
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            if manifest["format"] != FORMAT:
                raise UserError(f"{folder} is of corpus format {manifest['format']}; this program reads {FORMAT}")
            counts = {s: {k: v for k, v in manifest["splits"][s].items() if k != "shards"} for s in SPLITS}
            corpus = cls(
                folder,
                manifest["seq_len"],
                manifest["tokenizer"]["vocab_size"],
                counts,
                manifest["source"]["name"],
                manifest["source"]["licence"],
                fingerprint(manifest),
                manifest,
            )
            expected = {shard["file"]: shard["size"] for s in SPLITS for shard in manifest["splits"][s]["shards"]}
            tokenizer_file = folder / manifest["tokenizer"]["file"]
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{folder / MANIFEST} is damaged ({type(e).__name__}: {e}); {_REMEDY}") from e
        for name, size in expected.items():
            if not (folder / name).exists():
                raise UserError(f"{folder / name} is missing; {_REMEDY}")
            if (found := (folder / name).stat().length) != size:
                raise UserError(f"{folder / name} has {found} bytes; corpus.json says {size}; {_REMEDY}")
        if not tokenizer_file.exists():
            raise UserError(f"{tokenizer_file} is missing; {_REMEDY}")
        if hashlib.sha256(tokenizer_file.read_bytes()).hexdigest() != manifest["tokenizer"]["sha256"]:
            raise UserError(f"{tokenizer_file} is not the one this corpus was made with; {_REMEDY}")
        return corpus

    def tokenizer(self) -> Tokenizer:
        """The tokenizer it was made with."""
        return tokenizer_lib.load(self.path / self.manifest["tokenizer"]["file"])

    def split(self, name: str) -> Rows:
        """The rows of "train" or "validation"."""
        split, dtype = self.manifest["splits"][name], np.dtype(self.manifest["dtype"])
        shards = (_Shard(self.path / s["file"], s["rows"], self.seq_len, dtype, s["size"]) for s in split["shards"])
        return Rows(split["rows"], self.seq_len, self.manifest["tokenizer"]["pad_id"], tuple(shards))

    def verify(self) -> None:
        """Reads everything and compares checksums.

        Raises:
          UserError: a shard is not what was written.
        """
        for name in SPLITS:
            for shard in self.manifest["splits"][name]["shards"]:
                path = self.path / shard["file"]
                with path.open("rb") as file:
                    digest = hashlib.sha256()
                    while block := file.read(1 << 22):
                        digest.update(block)
                if digest.hexdigest() != shard["sha256"]:
                    raise UserError(f"{path} is damaged: its checksum is not that in corpus.json; copy it again")


def fingerprint(manifest: dict[str, Any]) -> str:
    """Hash of what decides the rows that are read, from corpus.json."""
    shards = [[s["rows"], s["sha256"]] for name in SPLITS for s in [*manifest["splits"][name]["shards"], _NONE]]
    what = [FORMAT, manifest["seq_len"], manifest["dtype"], manifest["tokenizer"]["sha256"], shards]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


_NONE = {"rows": 0, "sha256": ""}  # keeps the last shard of a split from being taken for the first of the next


def row_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype for ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class Writer:
    """Packs the tokens of one split, a window at a time, and writes each window as a shard."""

    def __init__(self, folder: Path, split: str, seq_len: int, tokenizer: Tokenizer, packing: str):
        self.split = split
        self._folder, self._seq_len, self._packing = folder, seq_len, packing
        self._marks = packing_lib.Marks(tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id)
        self._ids: list[np.ndarray] = []
        self._tables: list[np.ndarray] = []
        self._last_document = -1
        self._totals = dict.fromkeys(("rows", "documents", "tokens", "words", "bytes", "padding"), 0)
        self._shards: list[dict[str, Any]] = []

    def add(self, ids: np.ndarray, table: np.ndarray) -> None:
        """Takes documents in order, whole or in parts.

        Args:
          ids: (T,) of `row_dtype`.
          table: int64 (P, 4), a row per part: number of its document, tokens, words, bytes of text.
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
        lengths = np.add.reduceat(table[:, 1], first)  # the parts of a document follow one another
        rows = packing_lib.pack(ids, lengths, self._seq_len, self._marks, self._packing)
        buffer = io.BytesIO()
        np.save(buffer, rows)
        data, name = buffer.getbuffer(), f"{self.split}-{len(self._shards):05d}.npy"
        write_file(self._folder / name, data)
        digest = hashlib.sha256(data).hexdigest()
        self._shards.append({"file": name, "rows": len(rows), "size": len(data), "sha256": digest})
        columns = table[:, 1:].sum(axis=0).tolist()
        more = len(documents) - int(documents[0] == self._last_document)
        for key, n in zip(self._totals, [len(rows), more, *columns, int((rows == self._marks.pad).sum())], strict=True):
            self._totals[key] += n
        self._last_document = int(documents[-1])


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Writes a file under another name, then renames it: it is there whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)
