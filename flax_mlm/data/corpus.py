"""The corpus on disk: a folder with corpus.json, the tokenizer's file, and .npy shards of fixed-length rows.

    corpus.json  tokenizer.model  train-00000.npy  train-00000.crc32.npy  train-00001.npy ...  validation-00000.npy ...

A shard is an array (rows, L), uint16 when the vocabulary fits and uint32 otherwise; beside it lie the CRC-32 of
its rows, uint32 (rows,). corpus.json has the size and SHA-256 of every file, and its own SHA-256. Every row is
compared with its checksum whenever it is read, so a damaged row is an error that names it, never a batch.

Rows are read by their place in the file, on disk and on object stores (gs://) alike. Not memory-mapped: a mapped
file that shrinks, or whose disk fails, ends the process with SIGBUS and no word. Nothing is ever unpickled.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from flax_mlm.data import packing as packing_lib
from flax_mlm.data import tokenizer as tokenizer_lib
from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.errors import Failure, UserError
from flax_mlm.storage import files, gcs

FORMAT = 2  # raised whenever older readers would misread
MANIFEST = "corpus.json"
SPLITS = ("train", "validation")
_REMEDY = "copy the folder again, or delete it and prepare again"
WINDOW = 1 << 23  # tokens that are packed together and make a shard
_MANIFEST_LIMIT = 1 << 24  # bytes; 16 MiB list some 30,000 shards, far more than any corpus has


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

    @classmethod
    def joined(cls, splits: Sequence["Rows"]) -> "Rows":
        """The rows of several splits, one split after another; L and `pad_id` are the same in all."""
        shards = tuple(shard for rows in splits for shard in rows._shards)
        return cls(sum(rows.num_rows for rows in splits), splits[0].seq_len, splits[0].pad_id, shards)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Rows by their numbers, (n,) -> int32 (n, L). Only these are read, and each is compared with its checksum.

        Raises:
          IndexError: there is no such row.
          UserError: a row is not what was written, holds an id outside of the vocabulary, or cannot be read.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.num_rows:
            raise IndexError(f"row {indices.min()} or {indices.max()} of a split of {self.num_rows}")
        out = np.empty((len(indices), self.seq_len), np.int32)
        starts = np.cumsum([0] + [s.rows for s in self._shards])
        shard = np.searchsorted(starts, indices, side="right") - 1

        def fill(s: int) -> None:
            here = np.flatnonzero(shard == s)
            out[here] = self._shards[s].read(indices[here] - starts[s])

        if indices.size:
            gcs.together(fill, np.unique(shard).tolist(), self._shards[0].file.path)
        return out


@dataclasses.dataclass(frozen=True)
class _File:
    """A file as corpus.json describes it."""

    path: epath.Path
    size: int  # bytes
    sha256: str

    def check_size(self) -> None:
        with _reading(self.path):
            found = self.path.stat().length if self.path.exists() else None
        if found is None:
            raise UserError(f"{self.path} is missing; {_REMEDY}")
        if found != self.size:
            raise UserError(f"{self.path} has {found} bytes; corpus.json says {self.size}; {_REMEDY}")

    def content(self) -> bytes:
        with _reading(self.path):
            data = self.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise UserError(f"{self.path} is damaged: its checksum is not that in corpus.json; {_REMEDY}")
        return data


@dataclasses.dataclass(frozen=True)
class _Shard:
    file: _File
    checksums: _File
    rows: int
    seq_len: int
    dtype: np.dtype
    vocab_size: int

    @functools.cached_property
    def _crc32(self) -> np.ndarray:
        return np.frombuffer(self.checksums.content(), np.uint32, self.rows, self.checksums.size - 4 * self.rows)

    def read(self, indices: np.ndarray) -> np.ndarray:
        wanted, inverse = np.unique(indices, return_inverse=True)
        width = self.seq_len * self.dtype.itemsize
        header = self.file.size - self.rows * width
        ends = np.append(np.flatnonzero(np.diff(wanted) > 1) + 1, len(wanted))  # rows in a row are read at once
        lengths = np.diff(ends, prepend=0)
        places = header + wanted[ends - lengths] * width
        with _reading(self.file.path):
            parts = _read_ranges(self.file.path, places.tolist(), (lengths * width).tolist())
        data = memoryview(b"".join(parts))
        for i, (row, crc32) in enumerate(zip(wanted.tolist(), self._crc32[wanted].tolist(), strict=True)):
            if zlib.crc32(data[i * width : (i + 1) * width]) != crc32:  # also where the file ends early
                raise UserError(f"{self.file.path} is damaged: row {row} is not what was written; {_REMEDY}")
        tokens = np.frombuffer(data, self.dtype).reshape(-1, self.seq_len)
        if (largest := tokens.max()) >= self.vocab_size:
            row = wanted[tokens.max(axis=1).argmax()]
            raise UserError(
                f"{self.file.path} is of no use: row {row} holds token {largest}, but the vocabulary has "
                f"{self.vocab_size}; prepare it again"
            )
        return tokens[inverse.reshape(-1)]


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
    _splits: dict[str, Rows]
    _tokenizer: _File

    @classmethod
    def open(cls, path: str | Path) -> "Corpus":
        """Opens a folder made by `prepare`, and checks that every file is there in its full size.

        Raises:
          UserError: it is not a corpus, of another format, damaged or incomplete, names files outside of the folder,
            or its tokenizer is another one.
        """
        folder = gcs.parse("data.corpus", os.fspath(path)) or epath.Path(path).expanduser()
        gcs.check("data.corpus", folder)
        file = folder / MANIFEST
        with _reading(file):
            if not file.exists():
                raise UserError(
                    f"{folder} is not a corpus: it has no {MANIFEST}; make one with `python -m flax_mlm.prepare`"
                )
            if not 0 < (size := file.stat().length) <= _MANIFEST_LIMIT:  # also a pipe or a device, which has 0
                raise UserError(f"{file} has {size} bytes; it can have 1 to {_MANIFEST_LIMIT}; {_REMEDY}")
            data = file.read_bytes()
        try:
            manifest = json.loads(data)
            if manifest["format"] != FORMAT:
                raise UserError(
                    f"{folder} is of corpus format {manifest['format']!r:.40}; this program reads {FORMAT}; "
                    "delete it and prepare again"
                )
            corpus = cls._parse(folder, manifest)
            if manifest["sha256"] != files.digest(manifest):
                raise ValueError("its checksum is not that of its content")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{file} is damaged ({type(e).__name__}: {e}); {_REMEDY}") from e
        corpus._tokenizer.check_size()
        shards = [shard for rows in corpus._splits.values() for shard in rows._shards]
        gcs.together(_File.check_size, [part for s in shards for part in (s.file, s.checksums)], folder)
        corpus._tokenizer.content()
        return corpus

    @classmethod
    def _parse(cls, folder: epath.Path, manifest: dict[str, Any]) -> "Corpus":
        """Takes nothing in corpus.json for granted: it may be damaged, or come from anyone."""
        tokenizer, source, seq_len = manifest["tokenizer"], manifest["source"], _whole(manifest, "seq_len", 3)
        vocab_size, pad_id = _whole(tokenizer, "vocab_size", 1), _whole(tokenizer, "pad_id")
        dtype = row_dtype(vocab_size)
        if manifest["dtype"] != dtype.name or pad_id >= vocab_size:
            raise ValueError(f"dtype {manifest['dtype']!r:.40} or pad_id {pad_id} do not suit {vocab_size} tokens")
        splits, counts = {}, {}
        for name in SPLITS:
            split = manifest["splits"][name]
            counts[name] = {key: _whole(split, key) for key in _COUNTS}
            shards = []
            for shard in split["shards"]:
                rows = _whole(shard, "rows")
                tokens_file = _file(folder, shard, rows * seq_len * dtype.itemsize)
                crc32_file = _file(folder, shard["crc32"], rows * 4)
                shards.append(_Shard(tokens_file, crc32_file, rows, seq_len, dtype, vocab_size))
            if sum(s.rows for s in shards) != counts[name]["rows"]:
                raise ValueError(f"the shards of {name} do not have its {counts[name]['rows']} rows")
            splits[name] = Rows(counts[name]["rows"], seq_len, pad_id, tuple(shards))
        about = str(source["name"]), str(source["licence"]), fingerprint(manifest), manifest
        return cls(folder, seq_len, vocab_size, counts, *about, splits, _file(folder, tokenizer, 1))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer it was made with.

        Raises:
          UserError: it is not a tokenizer, or not of `vocab_size` pieces.
        """
        tokenizer = tokenizer_lib.load(self._tokenizer.path)
        if tokenizer.vocab_size != self.vocab_size:
            raise UserError(
                f"{self._tokenizer.path} has {tokenizer.vocab_size} pieces; corpus.json says {self.vocab_size}; "
                + _REMEDY
            )
        return tokenizer

    @property
    def about(self) -> dict[str, Any]:
        """What text it is, and how much of it is there to train on."""
        source, train = self.manifest["source"], self.counts["train"]
        return {
            **{key: source[key] for key in ("name", "licence")},
            **{key: train[key] for key in ("documents", "words", "tokens", "rows")},
        }

    def split(self, name: str) -> Rows:
        """The rows of "train" or "validation"."""
        return self._splits[name]

    def verify(self) -> None:
        """Reads everything and compares checksums; after that, no row can fail to be read.

        Raises:
          UserError: a file is not what was written.
        """
        for shard in (shard for rows in self._splits.values() for shard in rows._shards):
            shard.file.content()
            shard.read(np.arange(shard.rows))


def fingerprint(manifest: dict[str, Any]) -> str:
    """Hash of what decides the rows that are read, from corpus.json."""
    shards = [[s["rows"], s["sha256"]] for name in SPLITS for s in [*manifest["splits"][name]["shards"], _NONE]]
    # The first number is of this hash, not of the format: the same rows keep their fingerprint when that changes.
    what = [1, manifest["seq_len"], manifest["dtype"], manifest["tokenizer"]["sha256"], shards]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


_COUNTS = ("rows", "documents", "tokens", "words", "bytes", "padding")
_NONE = {"rows": 0, "sha256": ""}  # keeps the last shard of a split from being taken for the first of the next


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes corpus.json, with its own checksum in it."""
    sealed = {**manifest, "sha256": files.digest(manifest)}
    files.write_bytes(folder / MANIFEST, json.dumps(sealed, indent=1).encode())


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
        self._totals = dict.fromkeys(_COUNTS, 0)
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
        name = f"{self.split}-{len(self._shards):05d}"
        crc32 = np.array([zlib.crc32(row) for row in rows], np.uint32)
        entry = {"rows": len(rows), **self._save(f"{name}.npy", rows), "crc32": self._save(f"{name}.crc32.npy", crc32)}
        self._shards.append(entry)
        columns = table[:, 1:].sum(axis=0).tolist()
        more = len(documents) - int(documents[0] == self._last_document)
        for key, n in zip(self._totals, [len(rows), more, *columns, int((rows == self._marks.pad).sum())], strict=True):
            self._totals[key] += n
        self._last_document = int(documents[-1])

    def _save(self, name: str, array: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        np.save(buffer, array)
        data = buffer.getbuffer()
        files.write_bytes(self._folder / name, data)
        return {"file": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _whole(entry: dict[str, Any], key: str, least: int = 0) -> int:
    if type(value := entry[key]) is not int or value < least:
        raise ValueError(f"{key} is {value!r:.40}; it can be a whole number, {least} or more")
    return value


def _file(folder: epath.Path, entry: dict[str, Any], least: int) -> _File:
    """A file with at least so many bytes of content, in this folder and not elsewhere."""
    name = entry["file"]
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise ValueError(f"file is {name!r:.80}; it can be the plain name of a file in this folder")
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{name} is a link to {os.path.realpath(path)}, outside of this folder")
    return _File(path, _whole(entry, "size", least), str(entry["sha256"]))


def _read_ranges(path: epath.Path, starts: list[int], lengths: list[int]) -> list[bytes]:
    """Parts of a file. In a bucket each is a request of its own: an open file would read megabytes ahead of each."""
    if gcs.is_one(path):
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        return gcs.client().cat_ranges([os.fspath(path)] * len(starts), starts, ends, on_error="raise")
    file = os.open(path, os.O_RDONLY)  # a buffer would read 8 KiB for each row
    try:
        return [os.pread(file, length, start) for start, length in zip(starts, lengths, strict=True)]
    finally:
        os.close(file)


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    """Names the file when it cannot be read."""
    try:
        with gcs.errors(path):
            yield
    except (UserError, Failure):
        raise
    except Exception as e:  # object stores have exceptions of their own
        said = " ".join(str(e).split())
        raise UserError(f"{path} cannot be read ({type(e).__name__}: {said}); is its disk or network there?") from e
