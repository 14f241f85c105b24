"""Checkpoint storage, a local folder or one in a bucket: list, delete and quarantine steps.

A killed process never leaves half a step that counts as a whole one. A local step is renamed into `.trash` before it is
deleted, and into `.quarantine` where it is damaged. A bucket has no renaming: there a step loses its commit marker
first, and a step without a marker does not count.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from etils import epath

from flax_mlm.storage import gcs

MARKER = "commit_success.txt"  # orbax's AtomicityMode.COMMIT_FILE; written last
_QUARANTINE = ".quarantine"
_RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "16s"}  # 30 s; tensorstore's default is 15 minutes


class LocalStore:
    """The checkpoints in a local folder."""

    def __init__(self, path: Path):
        self.path = path

    def create(self) -> None:
        """Creates the folder unless it exists."""
        self.path.mkdir(parents=True, exist_ok=True)

    def empty_trash(self) -> None:
        """Finishes the deletions of a killed process."""
        shutil.rmtree(self.path / ".trash", ignore_errors=True)

    def names(self) -> list[str]:
        """Lists the entries of the folder, sorted. Raises OSError where there is no folder."""
        return sorted(path.name for path in self.path.iterdir())

    def has_quarantine(self) -> bool:
        """Returns whether a checkpoint was ever moved to quarantine."""
        return (self.path / _QUARANTINE).exists()

    def sync(self, name: str) -> None:
        """Waits until the files of a step are on the disk and not only in the page cache."""
        for folder, _, files in os.walk(self.path / name):
            for path in (*(os.path.join(folder, f) for f in files), folder):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

    def delete(self, name: str) -> None:
        """Deletes a step."""
        trash = self.path / ".trash"
        trash.mkdir(exist_ok=True)
        target = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=trash))
        (self.path / name).rename(target / name)
        shutil.rmtree(target, ignore_errors=True)

    def quarantine(self, name: str) -> Path:
        """Moves a step to quarantine. Returns its new folder."""
        folder = self.path / _QUARANTINE
        folder.mkdir(exist_ok=True)
        target = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder)) / name
        try:
            (self.path / name).rename(target)
        except FileNotFoundError:  # another process of this run was first
            target.parent.rmdir()
        return target.parent


class GcsStore:
    """The checkpoints in a folder of a bucket; the methods of `LocalStore`."""

    def __init__(self, path: epath.Path):
        self.path, self._client = path, gcs.client()

    def create(self) -> None:
        """Does nothing: a folder exists once it has an object."""

    def empty_trash(self) -> None:
        """Does nothing: a step that was being deleted has no marker, so the next sweep deletes it."""

    def names(self) -> list[str]:
        """Lists the entries of the folder, sorted; empty where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(path.name for path in self.path.iterdir())
        return []

    def has_quarantine(self) -> bool:
        """Returns whether a checkpoint was ever moved to quarantine."""
        return (self.path / _QUARANTINE).exists()

    def sync(self, name: str) -> None:
        """Does nothing: Cloud Storage keeps what it has acknowledged."""

    def delete(self, name: str) -> None:
        """Deletes a step, its marker first."""
        for path in (self.path / name / MARKER, self.path / name):
            with contextlib.suppress(FileNotFoundError):
                self._client.rm(os.fspath(path), recursive=True)

    def quarantine(self, name: str) -> epath.Path:
        """Moves a step to quarantine: copies it, the marker last, then deletes it, the marker first."""
        marker = gcs.read(self.path / name / MARKER)
        # The generation names the target, so that processes that see the same damage at once agree on it.
        target = self.path / _QUARANTINE / f"{name}-{marker[1] if marker else secrets.token_hex(4)}"
        source = os.fspath(self.path / name)
        for file in sorted(self._client.find(source), key=lambda file: file.endswith(f"/{name}/{MARKER}")):
            relative = file.removeprefix(source.removeprefix("gs://"))
            with contextlib.suppress(FileNotFoundError):  # another process has moved it
                self._client.cp_file(file, os.fspath(target / name) + relative)
        self.delete(name)
        return target


def open_store(path: gcs.AnyPath) -> LocalStore | GcsStore:
    """Opens the store of the checkpoints at a path."""
    return GcsStore(epath.Path(path)) if gcs.is_one(path) else LocalStore(Path(path))


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """Lists the steps of a run's committed checkpoints, ascending. Links and half-written folders do not count."""
    folder = epath.Path(workdir) / "checkpoints"
    if not (gcs.is_one(folder) or folder.is_dir()):
        return []
    steps = [path for name in open_store(folder).names() if is_step(path := folder / name)]
    committed = gcs.together(lambda path: (path / MARKER).exists(), steps, folder)
    return sorted(int(path.name) for path, is_committed in zip(steps, committed, strict=True) if is_committed)


def is_step(path: epath.Path) -> bool:
    """Returns whether a path is named as a step is, and is no link."""
    name = path.name
    return name.isascii() and name.isdigit() and str(int(name)) == name and not os.path.islink(os.fspath(path))


def bound_retries() -> None:
    """Limits how long tensorstore retries a bucket that does not answer; orbax has no option for it."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT["gcs_request_retries"] = _RETRIES
