"""Where the checkpoints of a run lie, a folder or one in a bucket, and how they go: deleted or put aside, and at no
moment half there, whenever the process is killed.

Folders are renamed first. A bucket cannot rename: there a step loses its commit marker first, and without that it
does not count.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from etils import epath

from flax_mlm.storage import gcs


class Folder:
    """The folder of a run's checkpoints."""

    def __init__(self, path: Path):
        self.path = path

    def make(self) -> None:
        """Makes it, if it is not there."""
        self.path.mkdir(parents=True, exist_ok=True)

    def empty(self) -> None:
        """Ends what a killed process was deleting."""
        shutil.rmtree(self.path / ".trash", ignore_errors=True)

    def names(self) -> list[str]:
        """What is in it. Raises OSError where it is not there."""
        return sorted(path.name for path in self.path.iterdir())

    def has_quarantine(self) -> bool:
        """Whether anything was ever put aside."""
        return (self.path / ".quarantine").exists()

    def settle(self, name: str) -> None:
        """Returns when a step is on the disk, and not only in its cache."""
        for folder, _, files in os.walk(self.path / name):
            for path in (*(os.path.join(folder, f) for f in files), folder):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

    def discard(self, name: str) -> None:
        """Deletes a step."""
        trash = self.path / ".trash"
        trash.mkdir(exist_ok=True)
        gone = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=trash))
        (self.path / name).rename(gone / name)
        shutil.rmtree(gone, ignore_errors=True)

    def quarantine(self, name: str) -> Path:
        """Puts a step aside. Returns where it is now."""
        folder = self.path / ".quarantine"
        folder.mkdir(exist_ok=True)
        target = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder)) / name
        try:
            (self.path / name).rename(target)
        except FileNotFoundError:  # another process of this run was first
            target.parent.rmdir()
        return target.parent


class Bucket:
    """The same for a folder in a bucket."""

    def __init__(self, path: epath.Path, marker: str):
        """`marker` is the name of the object without which a step does not count."""
        self.path, self._marker, self._client = path, marker, gcs.client()

    def make(self) -> None:
        """Nothing to make: it is there as soon as something is in it."""

    def empty(self) -> None:
        """Nothing to do: what was being deleted has no marker, and is found by the next sweep."""

    def names(self) -> list[str]:
        """What is in it; it is always there, if only empty."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(path.name for path in self.path.iterdir())
        return []

    def has_quarantine(self) -> bool:
        """Whether anything was ever put aside."""
        return (self.path / ".quarantine").exists()

    def settle(self, name: str) -> None:
        """Nothing to wait for: what Cloud Storage has acknowledged stays."""

    def discard(self, name: str) -> None:
        """Deletes a step, its marker first."""
        for path in (self.path / name / self._marker, self.path / name):
            with contextlib.suppress(FileNotFoundError):
                self._client.rm(os.fspath(path), recursive=True)

    def quarantine(self, name: str) -> epath.Path:
        """Puts a step aside: copies it, the marker last, and then deletes it, the marker first."""
        held = gcs.read(self.path / name / self._marker)
        # Processes that find the same damage at the same time put it in the same place.
        target = self.path / ".quarantine" / f"{name}-{held[1] if held else secrets.token_hex(4)}"
        source = os.fspath(self.path / name)
        found = sorted(self._client.find(source), key=lambda file: file.endswith(f"/{name}/{self._marker}"))
        for file in found:
            rest = file.removeprefix(source.removeprefix("gs://"))
            with contextlib.suppress(FileNotFoundError):  # one of those has copied and deleted it
                self._client.cp_file(file, os.fspath(target / name) + rest)
        self.discard(name)
        return target


def open_store(path: gcs.AnyPath, marker: str) -> Folder | Bucket:
    """What tends the checkpoints at a path."""
    return Bucket(epath.Path(path), marker) if gcs.is_one(path) else Folder(Path(path))
