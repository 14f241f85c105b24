"""Checkpoint storage, a local folder or one in a bucket: list, delete and quarantine steps.

A killed process never leaves half a step that counts as a whole one. A local step is renamed into `.trash` before it is
deleted, and into `.quarantine` where it is damaged. A bucket has no renaming: there a step loses its commit marker
first, and a step without a marker does not count.
"""

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath
from etils.epath import gpath

from flax_mlm.errors import UserError, as_user_error
from flax_mlm.storage import buckets, files, gcs
from flax_mlm.storage.retry import retrying

MARKER = "commit_success.txt"  # orbax's AtomicityMode.COMMIT_FILE; written last
ITEMS = ("params", "average", "rest", "meta")
_META = ("format", "tokenizer", "sha256")  # some keys of `meta`
# All that the folder of a step can hold; the last four until orbax has finished the item.
_ENTRIES = {"_CHECKPOINT_METADATA", MARKER, *ITEMS, *(f"{item}.orbax-checkpoint-tmp" for item in ITEMS)}
_TRASH, _QUARANTINE = ".trash", ".quarantine"
_RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "16s"}  # 30 s; tensorstore's default is 15 minutes


class LiteralPath(gpath.PosixGPath):
    """A path whose `glob` takes the path itself as it is written. Orbax looks for the arrays to merge with it, and
    would find none, and say nothing, where a folder above them has brackets in its name."""

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        if gcs.is_one(self):  # whose names have none
            yield from super().glob(pattern)
        else:
            yield from map(self._new, glob.glob(os.path.join(glob.escape(os.fspath(self)), pattern)))


def check_name(what: str, path: gcs.AnyPath) -> None:
    """Checks that arrays can be stored under a path.

    Args:
      what: the flag that has this value, for the message.

    Raises:
      UserError: tensorstore would take it for another path, or for none.
    """
    name = os.fspath(path)
    with as_user_error(
        f"{what}: '{name}' has bytes that are not UTF-8, so that no array can be stored there: ", UnicodeError
    ):
        name.encode()
    if "\\" in name:
        why = "contains a backslash, which the library that stores arrays takes for a slash"
        raise UserError(f"{what}: '{name}' {why}; rename the folder")


class Store:
    """The checkpoints in a folder."""

    def __init__(self, path: gcs.AnyPath):
        self._in_bucket = gcs.is_one(path)
        self._client: Any = gcs.client() if self._in_bucket else None  # also sets up the client of epath
        self._path: Any = epath.Path(path) if self._in_bucket else Path(path)

    def create(self) -> None:
        """Creates the folder unless it exists; one in a bucket exists once it has an object."""
        if not self._in_bucket:
            self._path.mkdir(parents=True, exist_ok=True)

    def empty_trash(self) -> None:
        """Finishes the deletions of a killed process; in a bucket they left a step without marker."""
        trash = Path(self._path, _TRASH)
        if self._in_bucket or not trash.is_dir():
            return
        for folder in trash.glob("*-*"):
            if {path.name for path in folder.iterdir()} <= {folder.name.partition("-")[0]}:
                shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # something else is in it
            trash.rmdir()

    def names(self) -> list[str]:
        """Lists the entries of the folder, sorted. Raises OSError where there is no folder; a bucket always has it."""
        absent = (FileNotFoundError,) if self._in_bucket else ()
        with contextlib.suppress(*absent):
            return sorted(path.name for path in self._path.iterdir())
        return []

    def has_quarantine(self) -> bool:
        """Returns whether a checkpoint was ever moved to quarantine."""
        return (self._path / _QUARANTINE).exists()

    def sync(self, name: str) -> None:
        """Waits until the files of a step are on the disk and not only in the page cache."""
        for folder, _, names in os.walk(self._path / name):  # no local files if it is in a bucket
            for path in (*(os.path.join(folder, f) for f in names), folder):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

    def delete(self, name: str) -> None:
        """Deletes a step."""
        if self._in_bucket:
            self._delete_in_bucket(self._path / name)
            return
        target = self._new_folder(_TRASH, name)
        (self._path / name).rename(target / name)
        shutil.rmtree(target, ignore_errors=True)

    def _delete_in_bucket(self, path: epath.Path) -> None:
        # `meta` goes last: it says whose the others are. With its own marker, what is left of it would be a stranger's.
        for part in (MARKER, *ITEMS[:-1], f"meta/{MARKER}", ""):
            with contextlib.suppress(FileNotFoundError):
                self._client.rm(os.fspath(path / part), recursive=True)

    def sweep(self) -> None:
        """Clears away what killed and failed saves of ours have left, which would block saving those steps."""
        committed = saved_steps(self._path.parent)
        for name in self.names():
            path = self._path / name
            if is_step(path) and int(name) not in committed and (is_own(path) or is_remains(path)):
                if (_entries(path) or set()) <= _ENTRIES:
                    self.delete(name)
                else:
                    self.quarantine(name)

    def quarantine(self, name: str) -> gcs.AnyPath:
        """Moves a step to quarantine. Returns its new folder."""
        if self._in_bucket:
            return self._quarantine_in_bucket(name)
        target = self._new_folder(_QUARANTINE, name)
        try:
            (self._path / name).rename(target / name)
        except FileNotFoundError:  # another process of this run was first
            target.rmdir()
        return target

    def quarantined(self) -> list[gcs.AnyPath]:
        """Lists the steps in quarantine, the last first."""
        found = [path for parent in (_entries(self._path / _QUARANTINE) or ()) for path in self._put_away(parent)]
        return sorted(found, key=lambda path: int(path.name), reverse=True)

    def _put_away(self, parent: str) -> list[gcs.AnyPath]:
        folder = self._path / _QUARANTINE / parent
        return [path for name in _entries(folder) or () if is_step(path := folder / name) and is_own(path)]

    def take_back(self, path: gcs.AnyPath) -> None:
        """Moves a step from quarantine to its place."""
        if self._in_bucket:
            self._move_in_bucket(path, self._path / path.name)
        else:
            Path(path).rename(self._path / path.name)
            with contextlib.suppress(OSError):
                Path(path).parent.rmdir()

    def _new_folder(self, parent: str, name: str) -> Path:
        (self._path / parent).mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._path / parent))

    def _quarantine_in_bucket(self, name: str) -> epath.Path:
        _, generation = gcs.read(self._path / name / MARKER)
        # The generation names the target, so that processes that see the same damage at once agree on it.
        target = self._path / _QUARANTINE / f"{name}-{generation or secrets.token_hex(4)}"
        self._move_in_bucket(self._path / name, target / name)
        return target

    def _move_in_bucket(self, source: epath.Path, target: epath.Path) -> None:
        """Copies a step, the marker last, then deletes it, the marker first."""
        name = os.fspath(source)
        for file in sorted(self._client.find(name), key=lambda file: file.endswith(f"/{source.name}/{MARKER}")):
            with contextlib.suppress(FileNotFoundError):  # another process has moved it
                self._client.cp_file(file, os.fspath(target) + file.removeprefix(name.removeprefix("gs://")))
        self._delete_in_bucket(source)


@retrying
def saved_steps(workdir: epath.PathLike) -> list[int]:
    """Lists the steps of a run's committed checkpoints, ascending. Links and half-written folders do not count."""
    folder = epath.Path(workdir) / "checkpoints"
    if not (gcs.is_one(folder) or files.exists(folder)):
        return []
    steps = [path for name in Store(folder).names() if is_step(path := folder / name)]
    committed = buckets.together(lambda path: files.exists(path / MARKER), steps, folder)
    return sorted(int(path.name) for path, is_committed in zip(steps, committed, strict=True) if is_committed)


@retrying
def is_own(path: gcs.AnyPath) -> bool:
    """Returns whether a folder is a checkpoint that flax_mlm has saved, be it damaged or not complete: its item `rest`
    or its `meta` tells. What is not known to be ours is never moved, deleted or called damaged."""
    if (names := _entries(path)) is None:
        return False
    if any(name.startswith("rest") for name in names & _ENTRIES):
        return True
    return files.read_object(path / "meta" / "metadata", *_META) is not None


@retrying
def is_remains(path: gcs.AnyPath) -> bool:
    """Returns whether a folder in a run of ours may be left from a save that was killed before `is_own` could tell: no
    other item is finished."""
    if (names := _entries(path)) is None or not names <= _ENTRIES:
        return False
    in_bucket = gcs.is_one(path)
    return not any(item in names and (not in_bucket or (path / item / MARKER).exists()) for item in ITEMS)


def _entries(path: gcs.AnyPath) -> set[str] | None:
    """Lists the names in a folder; None where it is none, or a link."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not os.path.islink(os.fspath(path)):
            return {entry.name for entry in path.iterdir()}
    return None


def is_step(path: gcs.AnyPath) -> bool:
    """Returns whether a path is named as a step is, and is no link."""
    name = path.name
    return name.isascii() and name.isdigit() and str(int(name)) == name and not os.path.islink(os.fspath(path))


def bound_retries() -> None:
    """Limits how long tensorstore retries a bucket that does not answer; orbax has no option for it."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT["gcs_request_retries"] = _RETRIES
