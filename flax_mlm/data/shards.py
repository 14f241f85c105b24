"""Files of a corpus, read by ranges and compared with their checksums.

Rows are read by their offset in the file, on disk and on object stores (gs://) alike. Files are not memory-mapped: a
mapped file that shrinks, or whose disk fails, ends the process with SIGBUS. Nothing is ever unpickled.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import zlib
from collections.abc import Iterator

import numpy as np
from etils import epath

from flax_mlm.errors import Failure, UserError
from flax_mlm.storage import gcs

REMEDY = "copy the folder again, or delete it and prepare again"


@dataclasses.dataclass(frozen=True)
class CheckedFile:
    """A file as corpus.json describes it: its size in bytes and its SHA-256."""

    path: epath.Path
    size: int
    sha256: str

    def check_size(self) -> None:
        """Compares the size. Raises UserError."""
        with reading(self.path):
            size = self.path.stat().length if self.path.exists() else None
        if size is None:
            raise UserError(f"{self.path} is missing; {REMEDY}")
        if size != self.size:
            raise UserError(f"{self.path} has {size} bytes; corpus.json says {self.size}; {REMEDY}")

    def content(self) -> bytes:
        """Reads the file and compares its checksum. Raises UserError."""
        with reading(self.path):
            data = self.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise UserError(f"{self.path} is damaged: its checksum differs from that in corpus.json; {REMEDY}")
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
        with reading(self.file.path):
            ranges = _read_ranges(self.file.path, offsets.tolist(), (lengths * width).tolist())
        data = memoryview(b"".join(ranges))
        for i, (row, crc32) in enumerate(zip(wanted.tolist(), self._crc32[wanted].tolist(), strict=True)):
            if zlib.crc32(data[i * width : (i + 1) * width]) != crc32:  # also where the file ends early
                raise UserError(f"{self.file.path} is damaged: row {row} differs from its checksum; {REMEDY}")
        tokens = np.frombuffer(data, self.dtype).reshape(-1, self.seq_len)
        if (largest := tokens.max()) >= self.vocab_size:
            row = wanted[tokens.max(axis=1).argmax()]
            raise UserError(
                f"{self.file.path} contains token id {largest} >= vocabulary size {self.vocab_size} in row {row}; "
                "prepare it again"
            )
        return tokens[inverse.reshape(-1)]


def _read_ranges(path: epath.Path, starts: list[int], lengths: list[int]) -> list[bytes]:
    """Reads ranges of a file. In a bucket each is a request: an open file would read megabytes ahead of each."""
    if gcs.is_one(path):
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        return gcs.client().cat_ranges([os.fspath(path)] * len(starts), starts, ends, on_error="raise")
    file = os.open(path, os.O_RDONLY)  # a buffered file would read 8 KiB for each row
    try:
        return [os.pread(file, length, start) for start, length in zip(starts, lengths, strict=True)]
    finally:
        os.close(file)


@contextlib.contextmanager
def reading(path: epath.Path) -> Iterator[None]:
    """Turns every exception about a file into a UserError that names it."""
    try:
        with gcs.errors(path):
            yield
    except (UserError, Failure):
        raise
    except Exception as e:  # object stores have exceptions of their own
        reason = " ".join(str(e).split())
        raise UserError(
            f"{path} cannot be read ({type(e).__name__}: {reason}); check that its disk is mounted, or its network up"
        ) from e
