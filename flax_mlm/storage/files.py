"""Files on disks and in buckets: text is read with clear errors, and files are written atomically, by renaming."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_mlm.errors import UserError, as_user_error
from flax_mlm.storage import buckets, gcs
from flax_mlm.storage.retry import retrying


def exists(path: gcs.AnyPath) -> bool:
    """Returns whether a path exists. Where a file server fails, the answer is an OSError, and not no."""
    if buckets.is_one(path):
        return buckets.stat(path) is not None or buckets.is_folder(path)
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size(file: gcs.AnyPath) -> int | None:
    """Returns the bytes of a file; None if there is none."""
    if buckets.is_one(file):
        found = buckets.stat(file)
        return found.size if found else None
    try:
        return os.stat(file).st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_bytes(file: gcs.AnyPath) -> bytes:
    """Reads a whole file. Raises OSError, and for buckets UserError and Unreachable."""
    return buckets.read(file) if buckets.is_one(file) else Path(file).read_bytes()


def read_ranges(file: gcs.AnyPath, starts: list[int], lengths: list[int]) -> list[bytes]:
    """Reads ranges of a file. In a bucket each is a request: an open file would read megabytes ahead of each."""
    if buckets.is_one(file):
        return buckets.read_ranges(file, starts, lengths)
    opened = os.open(file, os.O_RDONLY)  # a buffered file would read 8 KiB for each range
    try:
        return [os.pread(opened, length, start) for start, length in zip(starts, lengths, strict=True)]
    finally:
        os.close(opened)


def names(folder: gcs.AnyPath) -> list[str]:
    """Lists the names of the files in a folder, sorted; none where there is no folder."""
    if buckets.is_one(folder):
        return buckets.names(folder)
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except FileNotFoundError:
        return []


def delete(file: gcs.AnyPath) -> None:
    """Deletes a file, if it is there."""
    if buckets.is_one(file):
        buckets.delete(file)
    else:
        Path(file).unlink(missing_ok=True)


def delete_folder(folder: gcs.AnyPath) -> None:
    """Deletes a folder with all that is in it, if it is there."""
    if buckets.is_one(folder):
        buckets.delete_folder(folder)
    elif exists(folder):
        shutil.rmtree(folder)


@retrying
def read_text(file: Path) -> str:
    """Reads a UTF-8 file, without byte-order mark. Raises UserError."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{file} is not UTF-8: {e}") from e


def check_writable(flag: str, file: Path, makes_folders: bool = False) -> None:
    """Raises UserError if a file cannot be written, before there is something to write.

    Args:
      flag: the flag that names the file.
      makes_folders: missing parent folders will be made.
    """
    folder = next(p for p in file.parents if p.exists()) if makes_folders else file.parent
    try:
        if file.is_dir():
            raise UserError(f"{flag}: '{file}' is a folder; name a file")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise UserError(f"{flag}: '{file}' cannot be written: {e.strerror}") from e


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yields a temporary name to write to, and renames it to `file` at the end, which is never half-written."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(file: gcs.AnyPath, content: bytes | memoryview) -> None:
    """Writes a file atomically and waits until it is on the disk, or in the bucket."""
    if buckets.is_one(file):
        buckets.put(file, content)
        return
    with replacing(Path(file)) as temporary, temporary.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def read_object(file: gcs.AnyPath, *keys: str) -> dict[str, Any] | None:
    """Reads a JSON object that has these keys, also from a bucket; None where the file is no such thing."""
    try:
        content: Any = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and all(key in content for key in keys) else None


def write_text(file: gcs.AnyPath, text: str) -> None:
    """Writes UTF-8 text atomically, also into a bucket."""
    write_bytes(file, text.encode())


def digest(value: Any) -> str:
    """The hexadecimal SHA-256 of a JSON value; of an object without its entry `sha256`, which holds the digest."""
    if isinstance(value, dict):
        value = {key: content for key, content in value.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(file: gcs.AnyPath, value: Any) -> None:
    """Writes indented JSON atomically, also into a bucket. Raises UserError: a number in it is NaN or infinite."""
    with as_user_error(f"{file} cannot be written: ", ValueError):
        text = json.dumps(value, indent=2, allow_nan=False)
    write_text(file, text + "\n")


def read_json(file: Path) -> Any:
    """Reads JSON. Raises UserError: it cannot be read, is no JSON, or a number in it is NaN or infinite."""
    with as_user_error(f"{file} is not JSON of finite numbers: ", ValueError):
        return json.loads(read_text(file), parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    if math.isfinite(number := float(text)):
        return number
    raise ValueError(f"it has the number {text}")


@retrying
def read_result(file: gcs.AnyPath) -> dict[str, Any] | None:
    """Reads the JSON object of a result that can be made again; None: there is none, or what is there is damaged, such
    as by a number that is NaN or infinite."""
    try:
        value = json.loads(file.read_bytes(), parse_constant=_finite, parse_float=_finite) if exists(file) else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value else None
