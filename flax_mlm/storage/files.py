"""Whole files: read as text with one clear error, written under another name and then renamed. In a bucket what is
written appears whole anyway."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_mlm.errors import UserError
from flax_mlm.storage import gcs


def read_text(file: Path) -> str:
    """The content of a UTF-8 file, without byte-order mark. Raises UserError, which names it."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{file} is not UTF-8: {e}") from e


def check_writable(flag: str, file: Path, makes_folders: bool = False) -> None:
    """Finds out whether a file can be written, before there is something to write; and the folders that it is in, where
    they are going to be made. Raises UserError."""
    folder = next(p for p in file.parents if p.exists()) if makes_folders else file.parent
    try:
        if file.is_dir():
            raise UserError(f"{flag}: '{file}' is a folder; name a file")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise UserError(f"{flag}: '{file}' cannot be written: {e.strerror}") from e


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write to, which becomes `file` at the end: that is there whole, or as it was before."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(file: Path, content: bytes | memoryview) -> None:
    """Writes a whole file, or none; once this returns it also survives a power cut."""
    with replacing(file) as temporary, temporary.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def write_text(file: gcs.AnyPath, text: str) -> None:
    """The same with text, as UTF-8; also into a bucket."""
    if isinstance(file, Path):
        write_bytes(file, text.encode())
    else:
        file.write_text(text, encoding="utf-8")


def digest(content: dict[str, Any]) -> str:
    """SHA-256 of what will be a JSON object, in hexadecimal. An entry `sha256`, which holds it, does not count."""
    counted = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def write_json(file: gcs.AnyPath, value: Any) -> None:
    """As `write_text`, as indented JSON."""
    write_text(file, json.dumps(value, indent=2) + "\n")
