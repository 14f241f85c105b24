"""Files of a source: what a glob matches, on this machine or in a bucket."""

import contextlib
import dataclasses
import glob
import itertools
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flax_mlm.data.sources.base import Range, Source, grouped
from flax_mlm.errors import UserError
from flax_mlm.storage import buckets
from flax_mlm.storage.bucket_sources import find as objects_of
from flax_mlm.storage.bucket_sources import open_object


@dataclasses.dataclass(frozen=True)
class File:
    """A file to read documents from.

    Attributes:
      path: as it is shown to people.
      size: bytes.
      version: JSON-able; changes when the file does.
      object_version: in a bucket, that of the object which is read.
    """

    path: str
    size: int
    version: Any
    object_version: str = ""

    @contextlib.contextmanager
    def reading(self) -> Iterator[BinaryIO]:
        """Opens the file, buffered and with `peek`, and names it where it cannot be read. Raises UserError."""
        with naming(self.path), self._open() as file:
            yield file

    @property
    def is_local(self) -> bool:
        """True for a file of this machine."""
        return not buckets.is_one(self.path)

    def _open(self) -> BinaryIO:
        return open(self.path, "rb") if self.is_local else open_object(self.path, self.object_version)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Turns errors of reading a file into a UserError that names it."""
    try:
        yield
    except (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError) as e:
        raise UserError(f"{path} cannot be read to its end: {e}; check that the file is complete") from e


def find(spec: str, pattern: str) -> list[File]:
    """Finds the files of a source, see `find_files`.

    Args:
      spec: value of `data.source`, for errors.
    """
    return find_files(f"data.source is '{spec}'", pattern, spec.partition(":")[0] + ":")


def find_files(said: str, pattern: str, kind: str = "") -> list[File]:
    """Finds the files that match a glob, sorted. What exists as it is written stands for itself, such as a folder
    `text[1]`.

    Args:
      said: the name of the field and its value, for errors.
      kind: what such a value begins with.

    Raises:
      UserError: there is none, or what matches is neither a file nor a folder.
    """
    if buckets.is_url(said.partition(" ")[0], pattern):
        return _find_in_bucket(said, pattern, kind)
    path = Path(os.path.expanduser(pattern))
    literal = next((p for p in (path, *path.parents) if os.path.exists(p)), Path())
    matches = glob.glob(str(Path(glob.escape(str(literal)), path.relative_to(literal))), recursive=True)
    paths = sorted((Path(p) for p in matches if not os.path.isdir(p)), key=lambda p: list(map(os.fsencode, p.parts)))
    for each in paths:
        if not each.is_file():
            what = "a link to what is not there" if each.is_symlink() else "a pipe, a socket or a device"
            raise UserError(f"{said}, and {each} is {what}; expected files; mend it, or take it away")
    if not paths and path.is_dir():
        names = (kind + os.path.join(pattern, end) for end in ("*", "**"))
        raise UserError(f"{said}; '{pattern}' is a folder; expected files: {' or '.join(names)}")
    if not paths:
        raise UserError(f"{said}; no file matches '{pattern}' (from {os.getcwd()})")
    stats = ((path, path.stat()) for path in paths)
    return [File(str(path), s.st_size, [_name(path.resolve()), s.st_size, s.st_mtime_ns]) for path, s in stats]


def _name(path: Path) -> str:
    """Returns a path as it is in UTF-8, whatever the locale's encoding of names is."""
    return os.fsencode(path).decode(errors="surrogateescape")


def _find_in_bucket(said: str, pattern: str, kind: str) -> list[File]:
    found = objects_of(said.partition(" ")[0], pattern)
    if not found and buckets.is_folder(pattern):
        names = (kind + pattern.rstrip("/") + end for end in ("/*", "/**"))
        raise UserError(f"{said}; '{pattern}' is a folder; expected files: {' or '.join(names)}")
    if not found:
        raise UserError(f"{said}; no object matches '{pattern}'")
    return [File(each.url, each.size, [each.url, each.size, each.version], each.version) for each in found]


def from_files(
    name: str,
    files: list[File],
    ranges: Callable[[File], Iterable[Range]],
    check: Callable[[File], None] | None = None,
    settings: Any = None,
    licence: str = "not stated; that of the files",
) -> Source:
    """Makes a source of files.

    Args:
      ranges: divides a file.
      check: raises UserError where the beginning of a file shows that it is not of this format.
      settings: JSON-able; what else decides the documents.
    """

    def check_all() -> None:
        if check:
            buckets.together(check, files, files[0].path)

    version = [[file.version for file in files], settings]
    each = buckets.together(lambda file: list(ranges(file)), files, files[0].path)
    return Source(name, licence, version, grouped(itertools.chain.from_iterable(each)), check_all)
