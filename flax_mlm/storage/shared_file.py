"""A small file that jobs on several machines replace by compare-and-swap, in a local folder or in a bucket.

A local file is compared and replaced under a lock of its folder; Cloud Storage replaces an object only if it still has
a given generation.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from flax_mlm.storage import gcs
from flax_mlm.storage.gcs import AnyPath

_SETTLE_SECONDS = 0.5
_MAX_BYTES = 1 << 16


class LocalFile:
    """The file in a local folder."""

    def __init__(self, path: Path):
        self._path = path

    def read(self) -> bytes | None:
        """Reads the first 64 KiB; None if there is no file. Raises OSError for a link, and does not wait for a pipe."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            return os.read(descriptor, _MAX_BYTES)
        finally:
            os.close(descriptor)

    def replace(self, content: bytes, expected: bytes | None, writer: str, is_own: bool) -> bool:
        """Writes the file if its content is still as expected.

        Args:
          expected: None: there is no file.
          writer: name that no other job has.
          is_own: the expected content was written by this writer.

        Returns:
          False if the content has changed.
        """
        temporary = self._path.with_name(f"{self._path.name}.{writer}")
        with self._locked() as has_lock:
            if self.read() != expected:
                return False
            try:
                temporary.write_bytes(content)
                if has_lock or is_own:
                    temporary.replace(self._path)
                    return True
                return self._replace_without_lock(temporary, expected)
            finally:
                temporary.unlink(missing_ok=True)

    def _replace_without_lock(self, temporary: Path, expected: bytes | None) -> bool:
        """Replaces the file on a file system without locks: one job can move the old file away, and one can link a new
        file.

        A job that has moved a newer file than expected links it again. If a third job links its file in between, the
        owner of the newer file notices within `_SETTLE_SECONDS`, before it starts.
        """
        if expected is not None:
            old = temporary.with_name(f"{temporary.name}.old")
            try:
                self._path.rename(old)
            except FileNotFoundError:
                return False
            try:
                if old.read_bytes() != expected:
                    _link(old, self._path)
                    return False
            finally:
                old.unlink()
        if not _link(temporary, self._path):
            return False
        time.sleep(_SETTLE_SECONDS)
        return True

    def remove_if(self, condition: Callable[[bytes], bool]) -> None:
        """Removes the file if its content meets a condition."""
        with self._locked():
            if condition(self.read() or b""):
                self._path.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Locks the folder; yields False on a file system without locks."""
        descriptor = os.open(self._path.parent, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                has_lock = True
            except OSError:
                has_lock = False
            yield has_lock
        finally:
            os.close(descriptor)


class GcsFile:
    """The object in a bucket; the methods of `LocalFile`."""

    def __init__(self, path: AnyPath):
        self._path = path

    def read(self) -> bytes | None:
        """Reads the object; None if there is none."""
        content, _ = gcs.read(self._path) or (None, 0)
        return content

    def replace(self, content: bytes, expected: bytes | None, writer: str, is_own: bool) -> bool:
        """Writes the object if its content is still as expected; False if it has changed."""
        current, generation = gcs.read(self._path) or (None, 0)
        return current == expected and gcs.write(self._path, content, generation)

    def remove_if(self, condition: Callable[[bytes], bool]) -> None:
        """Removes the object if its content meets a condition."""
        content, generation = gcs.read(self._path) or (b"", 0)
        if condition(content):
            gcs.delete(self._path, generation)


def open_file(path: AnyPath) -> LocalFile | GcsFile:
    """Opens a file in a folder or a bucket; it need not exist."""
    return LocalFile(path) if isinstance(path, Path) else GcsFile(path)


def _link(file: Path, name: Path) -> bool:
    """Gives a file another name; False if the name exists."""
    try:
        os.link(file, name)
    except FileExistsError:
        return False
    return True
