"""Corpus on disk: a folder with corpus.json, the tokenizer's file, and .npy shards of fixed-length rows.

    corpus.json  tokenizer.model  train-00000.npy  train-00000.crc32.npy  train-00001.npy ...  validation-00000.npy ...

A shard holds the rows of one unit of the source (see `sources.py`): an array (rows, L), uint16 when the vocabulary fits
and uint32 otherwise; beside it lie the CRC-32 of its rows, uint32 (rows,). corpus.json has the size and SHA-256 of
every file, and its own SHA-256. Every row is compared with its checksum whenever it is read, so a damaged row is an
error that names it, never a batch.

Rows are read by their offset in the file, on disk and in buckets alike. Files are not memory-mapped: a
mapped file that shrinks, or whose disk fails, ends the process with SIGBUS. Nothing is ever unpickled.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.errors import Failure, UserError
from flax_mlm.storage import buckets, files
from flax_mlm.storage.gcs import AnyPath
from flax_mlm.storage.retry import retrying

FORMAT = 3  # raised whenever older readers would misread
MANIFEST = "corpus.json"
SPLITS = ("train", "validation")
COUNTS = ("rows", "documents", "tokens", "words", "bytes", "padding")  # of a split, in corpus.json
MAX_MANIFEST_BYTES = 1 << 30  # lists some three million shards, of 100 TB of text
_REMEDY = "copy the folder again, or delete it and prepare again"


@dataclasses.dataclass(frozen=True)
class CheckedFile:
    """A file as corpus.json describes it: its size in bytes and its SHA-256."""

    path: epath.Path
    size: int
    sha256: str

    @retrying
    def check_size(self) -> None:
        """Compares the size. Raises UserError."""
        with _reading(self.path):
            size = files.size(self.path)
        if size is None:
            raise UserError(f"{self.path} is missing; {_REMEDY}")
        if size != self.size:
            raise UserError(f"{self.path} has {size} bytes; corpus.json says {self.size}; {_REMEDY}")

    @retrying
    def content(self) -> bytes:
        """Reads the file and compares its checksum. Raises UserError."""
        with _reading(self.path):
            data = files.read_bytes(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise UserError(f"{self.path} is damaged: its checksum differs from that in corpus.json; {_REMEDY}")
        return data


@dataclasses.dataclass(frozen=True)
class Shard:
    """A .npy file of rows, and one of their checksums."""

    file: CheckedFile
    checksums: CheckedFile
    rows: int
    seq_len: int
    dtype: np.dtype
    vocab_size: int

    @functools.cached_property
    def _crc32(self) -> np.ndarray:
        return np.frombuffer(self.checksums.content(), np.uint32, self.rows, self.checksums.size - 4 * self.rows)

    @retrying
    def read(self, indices: np.ndarray) -> np.ndarray:
        """Reads rows by number, (n,) -> (n, L) of `dtype`.

        Raises:
          UserError: a row differs from its checksum, holds an id outside of the vocabulary, or cannot be read.
        """
        wanted, inverse = np.unique(indices, return_inverse=True)
        width = self.seq_len * self.dtype.itemsize
        header = self.file.size - self.rows * width
        ends = np.append(np.flatnonzero(np.diff(wanted) > 1) + 1, len(wanted))  # adjacent rows are one range
        lengths = np.diff(ends, prepend=0)
        offsets = header + wanted[ends - lengths] * width
        with _reading(self.file.path):
            ranges = files.read_ranges(self.file.path, offsets.tolist(), (lengths * width).tolist())
        data = memoryview(b"".join(ranges))
        for i, (row, crc32) in enumerate(zip(wanted.tolist(), self._crc32[wanted].tolist(), strict=True)):
            if zlib.crc32(data[i * width : (i + 1) * width]) != crc32:  # also where the file ends early
                raise UserError(f"{self.file.path} is damaged: row {row} differs from its checksum; {_REMEDY}")
        tokens = np.frombuffer(data, self.dtype).reshape(-1, self.seq_len)
        if (largest := tokens.max()) >= self.vocab_size:
            row = wanted[tokens.max(axis=1).argmax()]
            what = f"contains token id {largest} >= vocabulary size {self.vocab_size} in row {row}"
            raise UserError(f"{self.file.path} {what}; prepare it again")
        return tokens[inverse.reshape(-1)]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one split.

    Attributes:
      num_rows: N.
      seq_len: L.
      pad_id: id of the token that fills the end of a row.
    """

    num_rows: int
    seq_len: int
    pad_id: int
    _shards: tuple[Shard, ...]

    @classmethod
    def joined(cls, splits: Sequence["Rows"]) -> "Rows":
        """Joins several splits with the same L and `pad_id`, one after another."""
        shards = tuple(shard for rows in splits for shard in rows._shards)
        return cls(sum(rows.num_rows for rows in splits), splits[0].seq_len, splits[0].pad_id, shards)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Reads rows by number, (n,) -> int32 (n, L), and compares each with its checksum.

        Raises:
          IndexError: there is no such row.
          UserError: as `Shard.read`.
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
            buckets.together(fill, np.unique(shard).tolist(), self._shards[0].file.path)
        return out


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An open corpus.

    Attributes:
      path: its folder.
      seq_len: L, tokens per row.
      vocab_size: V, size of its tokenizer's vocabulary.
      counts: split -> rows, documents, tokens (special ones left out), words, bytes of text, padding.
      about: name and licence of the training text, and its documents, words, tokens and rows.
      fingerprint: hash of everything that decides which rows are read: equal for the same rows.
      manifest: content of corpus.json.
    """

    path: epath.Path
    seq_len: int
    vocab_size: int
    counts: dict[str, dict[str, int]]
    about: dict[str, Any]
    fingerprint: str
    manifest: dict[str, Any]
    _splits: dict[str, Rows]
    _tokenizer: CheckedFile

    @classmethod
    @retrying
    def open(cls, path: str | Path) -> "Corpus":
        """Opens a folder made by `prepare`, and checks that every file is there in its full size.

        Raises:
          UserError: the folder is not a corpus, has another format, is damaged or incomplete, names files outside of
            itself, or holds another tokenizer than the one it was made with.
        """
        folder = buckets.parse("data.corpus", os.fspath(path)) or epath.Path(path).expanduser()
        buckets.check("data.corpus", folder)
        file = folder / MANIFEST
        with _reading(file):
            size = files.size(file)
            if size is None:
                remedy = "make one with `python -m flax_mlm.prepare`"
                raise UserError(f"{folder} is not a corpus: it has no {MANIFEST}; {remedy}")
            if not 0 < size <= MAX_MANIFEST_BYTES:  # also a pipe or a device, which has 0
                raise UserError(f"{file} has {size} bytes; expected 1 to {MAX_MANIFEST_BYTES}; {_REMEDY}")
            data = files.read_bytes(file)
        try:
            manifest = json.loads(data)
            if manifest["format"] != FORMAT:
                what = f"{folder} has corpus format {manifest['format']!r:.40}; this program reads {FORMAT}"
                raise UserError(f"{what}; delete it and prepare again")
            corpus = cls._parse(folder, manifest)
            if manifest["sha256"] != files.digest(manifest):
                raise ValueError("its checksum differs from that of its content")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{file} is damaged ({type(e).__name__}: {e}); {_REMEDY}") from e
        shards = [shard for rows in corpus._splits.values() for shard in rows._shards]
        parts = [corpus._tokenizer, *(file for shard in shards for file in (shard.file, shard.checksums))]
        buckets.together(CheckedFile.check_size, parts, folder)
        corpus._tokenizer.content()
        return corpus

    @classmethod
    def _parse(cls, folder: epath.Path, manifest: dict[str, Any]) -> "Corpus":
        """Parses corpus.json, which may be damaged or come from anyone; raises ValueError and the like."""
        tokenizer, seq_len = manifest["tokenizer"], _whole(manifest, "seq_len", 3)
        vocab_size, pad_id = _whole(tokenizer, "vocab_size", 1), _whole(tokenizer, "pad_id")
        dtype = row_dtype(vocab_size)
        if manifest["dtype"] != dtype.name or pad_id >= vocab_size:
            raise ValueError(f"dtype {manifest['dtype']!r:.40} or pad_id {pad_id} do not suit {vocab_size} tokens")
        splits, counts = {}, {}
        for name in SPLITS:
            split = manifest["splits"][name]
            counts[name] = {key: _whole(split, key) for key in COUNTS}
            shards = []
            for shard in split["shards"]:
                rows = _whole(shard, "rows")
                tokens_file = _file(folder, shard, rows * seq_len * dtype.itemsize)
                crc32_file = _file(folder, shard["crc32"], rows * 4)
                shards.append(Shard(tokens_file, crc32_file, rows, seq_len, dtype, vocab_size))
            if sum(s.rows for s in shards) != counts[name]["rows"]:
                raise ValueError(f"the shards of {name} do not have its {counts[name]['rows']} rows")
            splits[name] = Rows(counts[name]["rows"], seq_len, pad_id, tuple(shards))
        about: dict[str, Any] = {key: str(manifest["source"][key]) for key in ("name", "licence")}
        about |= {key: counts["train"][key] for key in ("documents", "words", "tokens", "rows")}
        tokenizer_file = _file(folder, tokenizer, 1)
        return cls(folder, seq_len, vocab_size, counts, about, fingerprint(manifest), manifest, splits, tokenizer_file)

    def tokenizer(self) -> Tokenizer:
        """Opens the tokenizer that the corpus was made with.

        Raises:
          UserError: the file is not a tokenizer, or not one with `vocab_size` tokens.
        """
        tokenizer = load_tokenizer(self._tokenizer.path)
        if tokenizer.vocab_size != self.vocab_size:
            what = f"{self._tokenizer.path} has {tokenizer.vocab_size} tokens"
            raise UserError(f"{what}; corpus.json says {self.vocab_size}; {_REMEDY}")
        return tokenizer

    def split(self, name: str) -> Rows:
        """Returns the rows of "train" or "validation"."""
        return self._splits[name]


def write_manifest(folder: AnyPath, manifest: dict[str, Any]) -> None:
    """Writes corpus.json, with its own checksum in it."""
    files.write_text(folder / MANIFEST, json.dumps({**manifest, "sha256": files.digest(manifest)}, indent=1))


def fingerprint(manifest: dict[str, Any]) -> str:
    """Hashes what decides the rows that are read, from corpus.json."""
    end = {"rows": 0, "sha256": ""}  # keeps the last shard of a split apart from the first of the next
    shards = [[s["rows"], s["sha256"]] for name in SPLITS for s in [*manifest["splits"][name]["shards"], end]]
    # The first number versions this hash, not the format: the same rows keep their fingerprint when that changes.
    return files.digest([1, manifest["seq_len"], manifest["dtype"], manifest["tokenizer"]["sha256"], shards])


def row_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest dtype for ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _whole(entry: dict[str, Any], key: str, least: int = 0) -> int:
    if type(value := entry[key]) is not int or value < least:
        raise ValueError(f"{key} is {value!r:.40}; expected a whole number, {least} or more")
    return value


def _file(folder: epath.Path, entry: dict[str, Any], least: int) -> CheckedFile:
    """Parses the entry of a file, which has at least so many bytes of content and lies in this folder."""
    name = entry["file"]
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise ValueError(f"file is {name!r:.80}; expected the plain name of a file in this folder")
    path = folder / name
    if os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{name} is a link to {os.path.realpath(path)}, outside of this folder")
    return CheckedFile(path, _whole(entry, "size", least), str(entry["sha256"]))


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    """Turns every exception about a file into a UserError that names it."""
    try:
        with buckets.errors(path):
            yield
    except (UserError, Failure):
        raise
    except Exception as e:  # object stores have exceptions of their own
        what = f"{path} cannot be read ({type(e).__name__}: {' '.join(str(e).split())})"
        raise UserError(f"{what}; check that its disk is mounted, or its network up") from e
