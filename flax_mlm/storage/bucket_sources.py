"""Sources in buckets: objects found by a glob, and opened for reading."""

import fnmatch
import io
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from flax_mlm.errors import UserError
from flax_mlm.storage import buckets, gcs
from flax_mlm.storage.buckets import AnyPath, Found
from flax_mlm.storage.objects import Object

_GLOB = re.compile(r"[*?\[]")
_FIRST_BLOCK, _LARGEST_BLOCK = 1 << 18, 1 << 23  # bytes read at once: more and more while they are read in order


def find(what: str, pattern: str) -> list[Found]:
    """Finds the objects that match a glob, in the order of their names; `**` stands for any number of folders.

    What exists as it is written stands for itself, such as a folder `text[1]`. As on a disk, names that begin with a
    dot are found only by patterns that do.

    Args:
      what: the flag or field that has this value, for error messages.

    Raises:
      UserError: it is no URL of a bucket, there is no such bucket, or the credentials are insufficient.
      Unreachable: the bucket does not answer.
    """
    scheme, bucket, name = re.fullmatch(r"(\w+)://([^/]*)/*(.*)", pattern, re.S).groups()  # type: ignore[union-attr]
    if not re.fullmatch(gcs.BUCKET, bucket) or not name:
        raise UserError(f"{what}: '{pattern}' is not a path in a bucket; expected {scheme}://BUCKET/PATH")
    buckets.require_package(what, pattern)
    with buckets.in_bucket(what, f"{scheme}://{bucket}"):
        if found := buckets.stat(pattern):
            return [found]
        parts, literal = name.split("/"), 0
        for i in range(len(parts) - 1, 0, -1):  # the longest folder that is there as it is written
            if not _GLOB.search("/".join(parts[:i])) or buckets.is_folder(f"{scheme}://{bucket}/{'/'.join(parts[:i])}"):
                literal = i
                break
        folder = "".join(f"{part}/" for part in parts[:literal])
        objects = _glob(f"{scheme}://{bucket}", bucket, folder, parts[literal:])
        unique = {o.name: Found(f"{scheme}://{bucket}/{o.name}", o.size, o.version) for o in objects}
    return [unique[key] for key in sorted(unique, key=lambda key: key.split("/"))]


def _glob(url: str, bucket: str, folder: str, parts: list[str]) -> Iterator[Object]:
    """Finds the objects under a folder whose further names match these parts of a pattern."""
    head, *rest = parts
    flat = head == "**" or (not rest and not _GLOB.search(head))
    prefix = folder + (head[: m.start()] if (m := _GLOB.search(head)) else head) * (head != "**")
    for entry in buckets.entries(url, bucket, prefix, "" if flat else "/", 0):
        name = entry.name if isinstance(entry, Object) else entry
        below = name.removeprefix(folder).rstrip("/").split("/")
        if isinstance(entry, Object) and not name.endswith("/"):
            if _matches(below, parts):
                yield entry
        elif not flat and rest and _matches(below, [head]):
            yield from _glob(url, bucket, folder + below[0] + "/", rest)


def _matches(names: list[str], parts: list[str]) -> bool:
    if not names or not parts:
        return not names and not parts
    (name, *names_after), (part, *parts_after) = names, parts
    if parts == ["**"]:
        return not any(name.startswith(".") for name in names)
    if part == "**":
        return _matches(names, parts_after) or (not name.startswith(".") and _matches(names_after, parts))
    is_hidden = name.startswith(".") and not part.startswith(".")
    return not is_hidden and fnmatch.fnmatchcase(name, part) and _matches(names_after, parts_after)


def open_object(path: AnyPath | str, version: str = "") -> BinaryIO:
    """Opens an object for reading: buffered, seekable, with `peek`. Reading asks again after temporary errors.

    Args:
      version: that of `find`; an object that has changed since is refused.

    Raises:
      UserError: there is no such object, or it has another version; reading raises it where it changes meanwhile.
      Unreachable: the bucket does not answer; reading raises it as well.
    """
    found = buckets.stat(path)
    if found is None:
        raise UserError(f"'{path}' is not there; it may have been deleted after it was found")
    if version and found.version != version:
        raise buckets.changed(path)
    return io.BufferedReader(_Reader(found))  # type: ignore[return-value]


class _Reader(io.RawIOBase):
    """Reads an object in blocks, which grow while it is read in order: few requests, and little in vain elsewhere."""

    def __init__(self, found: Found):
        self.name, self.mode = found.url, "rb"
        self._found, self._position, self._start, self._block = found, 0, 0, b""
        self._next = _FIRST_BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._found.size}[whence]
        if position < 0:
            raise ValueError(f"negative seek value {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._found.size - self._position)
        if wanted <= 0:
            return 0
        end = self._start + len(self._block)
        if not self._start <= self._position < end:
            self._next = min(2 * self._next, _LARGEST_BLOCK) if self._position == end > 0 else _FIRST_BLOCK
            self._start = self._position
            end = min(self._start + max(wanted, self._next), self._found.size)
            self._block = b""  # no two at a time
            self._block = buckets.get(self._found.url, self._found, self._start, end)
        block = memoryview(self._block)[self._position - self._start :][:wanted]
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)
