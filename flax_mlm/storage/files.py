"""Whole files: text is read with clear errors, and written atomically by renaming; objects in buckets always are."""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_mlm.errors import UserError, as_user_error
from flax_mlm.storage import gcs
from flax_mlm.storage.retry import retrying


def exists(path: gcs.AnyPath) -> bool:
    """Returns whether a path exists. Where a file server fails, the answer is an OSError, and not no."""
    if gcs.is_one(path):
        return path.exists()
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


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


def write_bytes(file: Path, content: bytes | memoryview) -> None:
    """Writes a file atomically and waits until it is on the disk."""
    with replacing(file) as temporary, temporary.open("wb") as opened:
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
    if isinstance(file, Path):
        write_bytes(file, text.encode())
    else:
        file.write_text(text, encoding="utf-8")


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
