"""Folders of unfinished work, which several processes and machines may share.

On a disk, all of it lies in OUTPUT.tmp/REQUEST, which is locked; at the end its folder `corpus` is renamed to OUTPUT.
In a bucket nothing is renamed or locked: shards are written to OUTPUT itself, its corpus.json last, and only the
tokenizer and the records lie in OUTPUT.tmp/REQUEST. Whoever writes a file writes the same bytes, and all of them or
nothing.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flax_mlm.data.corpus import MANIFEST, SPLITS, Corpus, write_manifest
from flax_mlm.data.sources.base import Unit
from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.errors import UserError
from flax_mlm.storage import buckets, files
from flax_mlm.storage.gcs import AnyPath

Log = Callable[[str], None]

_SUBFOLDERS = ("signatures", "units", "shards", "errors", "writing", "corpus")


@dataclasses.dataclass(frozen=True)
class Work:
    """A folder of unfinished work; it can be pickled.

    Attributes:
      folder: has the tokenizer in `tokenizer`; each finished unit leaves `units/UNIT.json`, each finished part
        `units/UNIT-PART.json`, each unit that cannot be made `errors/UNIT.json`, and each `--shard` that was begun
        `shards/K-of-N.json`.
      corpus: folder for the shards.
    """

    folder: AnyPath
    corpus: AnyPath

    @property
    def tokenizer(self) -> AnyPath:
        """Folder with the file of the tokenizer."""
        return self.folder / "tokenizer"

    def finished(self, unit: int) -> dict[str, Any] | None:
        """Reads the record of a unit, see `make_units`; None: it is not finished."""
        return files.read_object(self.folder / "units" / f"{unit:05d}.json", "parts")

    def unfinished(self, units: Iterable[Unit]) -> list[Unit]:
        """Returns the units that are not finished."""
        units = list(units)
        records = buckets.together(self.finished, [unit.number for unit in units], self.folder)
        return [unit for unit, record in zip(units, records, strict=True) if not record]

    def part(self, unit: int, part: int) -> dict[str, Any] | None:
        """Reads the record of a part, see `make_units`; None: it is not finished."""
        return files.read_object(self._part(unit, part), *SPLITS)

    def finish_part(self, unit: int, part: int, record: dict[str, Any]) -> None:
        """Writes the record of a part."""
        self._write_json(self._part(unit, part), record)

    def finish(self, unit: int, record: dict[str, Any]) -> None:
        """Writes the record of a unit."""
        self._write_json(self.folder / "units" / f"{unit:05d}.json", record)

    def fail(self, unit: int, message: str) -> None:
        """Writes why a unit cannot be made."""
        self._write_json(self.folder / "errors" / f"{unit:05d}.json", {"message": message})

    def failures(self) -> list[str]:
        """Reads why units cannot be made, in their order."""
        names = files.names(self.folder / "errors")
        records = buckets.together(lambda name: files.read_object(self.folder / "errors" / name), names, self.folder)
        return [record["message"] for record in records if record]

    def has_failed(self) -> bool:
        """Returns whether some unit cannot be made."""
        return bool(files.names(self.folder / "errors"))

    def forget_failures(self) -> None:
        """Deletes the records of units that could not be made, so that they are tried again."""
        for name in files.names(self.folder / "errors"):
            files.delete(self.folder / "errors" / name)

    def begin_shard(self, shard: int, num_shards: int) -> None:
        """Notes that a shard was begun."""
        self._write_json(self.folder / "shards" / f"{shard}-of-{num_shards}.json", {})

    def num_shards(self) -> int | None:
        """Returns how many shards there are; None: none was begun, or with different numbers."""
        numbers = {int(name.removesuffix(".json").rpartition("-")[2]) for name in files.names(self.folder / "shards")}
        return numbers.pop() if len(numbers) == 1 else None

    def write(self, file: AnyPath, content: bytes | memoryview) -> None:
        """Writes a file, of which others see all or nothing, also when several write it at once."""
        if buckets.is_one(file):
            files.write_bytes(file, content)
            return
        new = self.folder / "writing" / f"{file.name}.{platform.node()}.{os.getpid()}.{threading.get_ident()}"
        try:
            with open(new, "wb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(new, file)
        except OSError:
            Path(new).unlink(missing_ok=True)
            raise

    def claim(self) -> None:
        """Says in a bucket, where nothing is locked, that work has begun. Raises UserError: so has that of others."""
        if buckets.is_one(self.folder):
            files.write_json(_marker(self.folder), {})
            _refuse_others(self)  # they may have looked at the same time

    def keep_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Writes the tokenizer: a kill does not cost the work."""
        if buckets.is_one(self.folder):
            self.claim()
            files.write_bytes(self.tokenizer / tokenizer.filename, tokenizer.content)
            return
        new = Path(self.folder) / "tokenizer.new"
        new.mkdir(exist_ok=True)
        tokenizer.save(new)
        new.rename(self.tokenizer)

    def publish(self, output: AnyPath, tokenizer: Tokenizer, manifest: dict[str, Any]) -> None:
        """Writes the tokenizer's file and corpus.json, with which the corpus is there."""
        self.write(self.corpus / tokenizer.filename, tokenizer.content)
        write_manifest(self.corpus, manifest)
        if not buckets.is_one(output):
            Path(self.corpus).rename(output)

    def _part(self, unit: int, part: int) -> AnyPath:
        return self.folder / "units" / f"{unit:05d}-{part:05d}.json"

    def _write_json(self, file: AnyPath, value: Any) -> None:
        self.write(file, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def working(output: AnyPath, request: str, log: Log, is_alone: bool) -> Iterator[Work | None]:
    """Makes the folder of unfinished work, and removes it where nothing in it is worth keeping.

    Args:
      request: hash of all that decides the bytes of the corpus.
      is_alone: others must not work there; otherwise they may, if they are not alone either. Has no effect in a
        bucket.

    Yields:
      None where the corpus is there already.
    """
    folder = output.parent / (output.name + ".tmp")
    try:
        if buckets.is_one(output):
            with _in_bucket(output, folder, request, log, is_alone) as work:
                yield work
            return
        if is_done(output, request) and not folder.exists():
            log(f"corpus: {output}, already prepared")
            yield None
            return
        with _claimed(Path(folder), log, is_alone), _removing(Path(folder), is_alone):
            done = is_done(output, request)  # another process may have made it during the wait for the lock
            work = Work(folder / request[:16], folder / request[:16] / "corpus")
            if is_alone:
                _delete_unfinished(Path(work.folder))
            for name in () if done else _SUBFOLDERS:
                (work.folder / name).mkdir(parents=True, exist_ok=True)
            if done:
                log(f"corpus: {output}, already prepared")
            yield None if done else work
    except OSError as e:
        raise UserError(f"cannot write {output}: {e.strerror or e}; fix this and rerun; finished work is reused") from e


def _delete_unfinished(folder: Path) -> None:
    """Deletes what processes that were killed were writing, so that many kills do not fill the disk."""
    for path in (*folder.glob("writing/*"), *folder.glob("signatures/.*")):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _removing(folder: Path, is_alone: bool) -> Iterator[None]:
    """Removes the folder of unfinished work at the end, and after an error where no unit is finished. Who is not alone
    removes it if nothing is in it."""
    try:
        yield
    except UserError:
        kept = ("*/units/*.json", "*/signatures/*")  # finished units are worth keeping
        if _is_empty(folder) or (is_alone and not any(p for each in kept for p in folder.glob(each))):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if is_alone or _is_empty(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _is_empty(folder: Path) -> bool:
    return {path.name for path in folder.glob("*")} == {"lock"}


@contextlib.contextmanager
def _in_bucket(output: AnyPath, folder: AnyPath, request: str, log: Log, is_alone: bool) -> Iterator[Work | None]:
    buckets.check("--output", output)
    work = Work(folder / request[:16], output)
    _refuse_others(work)
    if is_done(output, request, files.exists(_marker(work.folder))):
        log(f"corpus: {output}, already prepared")
        yield None
    else:
        buckets.check_writable("--output", work.folder)
        try:
            yield work
        except UserError:
            if is_alone and not files.names(work.folder / "units") and not files.names(work.folder / "signatures"):
                files.delete_folder(folder)
            raise
    if is_alone:
        files.delete_folder(folder)


def _refuse_others(work: Work) -> None:
    """Raises UserError if a bucket has unfinished work of other text or settings."""
    folder = work.folder.parent
    if others := {*files.names(folder)} - {_marker(work.folder).name}:
        what = f"{folder} holds unfinished work of other text or settings ({min(others)})"
        raise UserError(f"{what}; finish it with those, or delete it and {work.corpus}, or name another folder")


def _marker(folder: AnyPath) -> AnyPath:
    """The object that says that a folder of unfinished work is in use: a listing shows objects, and no folders."""
    return folder.parent / f"{folder.name}.json"


def is_done(output: AnyPath, request: str, has_work: bool = False) -> bool:
    """Returns whether a corpus is there.

    Args:
      has_work: it may be without a manifest.

    Raises:
      UserError: something else is there.
    """
    if files.exists(output / MANIFEST):
        if Corpus.open(os.fspath(output)).manifest["request"] == request:
            return True
        what = f"{output} holds a corpus of other text or settings"
        raise UserError(f"{what}; name another folder, or delete that one")
    if has_work or not files.exists(output):
        return False
    if buckets.is_one(output) or not os.path.isdir(output) or os.listdir(output):
        raise UserError(f"the output, {output}, exists and is not a corpus; name another folder")
    return False


@contextlib.contextmanager
def _claimed(folder: Path, log: Log, is_alone: bool) -> Iterator[None]:
    """Makes the folder of unfinished work, and locks out other processes until the block ends."""
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if not re.fullmatch("lock|[0-9a-f]{16}", path.name):
                raise UserError(f"{path} is not ours, and its folder is for unfinished work; move it away")
    with contextlib.ExitStack() as claim:
        while not _claims(folder, log, is_alone, claim):
            pass
        yield


def _claims(folder: Path, log: Log, is_alone: bool, claim: contextlib.ExitStack) -> bool:
    """Locks the folder until the stack is closed; False: the last owner has removed it meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as attempt:
        file = attempt.enter_context(locked(folder / "lock", log, is_alone))
        if os.path.samestat(os.fstat(file.fileno()), (folder / "lock").stat()):
            claim.enter_context(attempt.pop_all())
            return True
    return False


@contextlib.contextmanager
def locked(path: AnyPath, log: Log, is_alone: bool = True) -> Iterator[Any]:
    """Locks a file, alone or with others that are not alone either. Does nothing in a bucket."""
    if buckets.is_one(path):
        yield None
        return
    with open(path, "w") as file:
        kind = fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"another process is at work in {os.path.dirname(path)}; waiting for it")
            fcntl.flock(file, kind)
        yield file
