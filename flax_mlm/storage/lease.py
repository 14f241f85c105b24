"""An exclusive lease on a workdir, so that two jobs never write to one run.

`workdir/lease.json` names its holder and has a counter that increases every few seconds. If the holder runs on this
machine, the operating system knows whether it is alive; a holder on another machine is gone when its counter stops,
because the clocks of two machines cannot be compared.

The file is replaced by compare-and-swap: on a disk under a lock of its folder, in a bucket by the object's generation.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax_mlm.errors import Failure, UserError, as_user_error
from flax_mlm.storage import gcs
from flax_mlm.storage.retry import retrying

_NAME = "lease.json"
_BEAT = 5.0  # seconds between increments of the counter
_STALE = 20.0  # seconds without an increment after which a holder on another machine is gone
_SETTLE_SECONDS = 0.5
_MAX_BYTES = 1 << 16


class Lease:
    """A lease on a workdir. Once taken, a thread increments its counter."""

    def __init__(self, workdir: gcs.AnyPath, run_id: str):
        """`run_id` identifies this holder among all jobs."""
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._holder = {**_machine(), "pid": os.getpid(), "started": _start_time(os.getpid())}
        self._holder |= {"run_id": run_id, "since": since}
        self._workdir, self._run_id = workdir, run_id
        self._beats, self._released = 0, threading.Event()
        self._file = workdir / _NAME

    def take(self, log: Callable[[str], None], stale: float = _STALE) -> None:
        """Takes the lease, and makes the workdir unless it exists.

        Args:
          log: receives a line if another holder is watched or replaced.
          stale: seconds without an increment after which a holder on another machine is gone.

        Raises:
          UserError: another job holds the lease, or the workdir cannot be written.
        """
        with as_user_error(f"--workdir: '{self._workdir}' cannot be used: ", OSError):
            if isinstance(self._workdir, Path):  # buckets have no folders
                self._workdir.mkdir(parents=True, exist_ok=True)
            while True:
                if (content := _read(self._file)) is not None:
                    _wait_until_gone(self._workdir, content, log, stale)
                if self._write(content):
                    break
            self.check()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def check(self) -> None:
        """Raises UserError if another job has taken the lease because this one seemed gone."""
        if not self._is_own(content := _read(self._file)):
            state = f"now belongs to {_describe(_parse(content))}" if content else "has lost its lease.json"
            raise UserError(f"--workdir: '{self._workdir}' {state}; this job must not write to it any more")

    def release(self) -> None:
        """Removes the lease if this job still holds it."""
        self._released.set()
        with contextlib.suppress(OSError, UserError, Failure):
            while self._is_own(content := _read(self._file)):
                if _replace(self._file, content, None, self._run_id):
                    break

    def _is_own(self, content: bytes | None) -> bool:
        return _parse(content).get("run_id") == self._run_id

    def _write(self, expected: bytes | None) -> bool:
        content = json.dumps({**self._holder, "beats": self._beats}) + "\n"
        return _replace(self._file, expected, content.encode(), self._run_id)

    def _beat(self) -> None:
        while not self._released.wait(_BEAT):
            with contextlib.suppress(OSError, UserError, Failure):  # a full disk: the next write may succeed
                if not self._is_own(content := _read(self._file)):
                    return
                self._beats += 1
                self._write(content)


def holder(workdir: gcs.AnyPath) -> str:
    """The run_id of the holder of a workdir's lease; empty if there is none."""
    try:
        return str(_parse(_read(workdir / _NAME)).get("run_id", ""))
    except OSError:
        return ""


def _wait_until_gone(workdir: gcs.AnyPath, content: bytes, log: Callable[[str], None], stale: float) -> None:
    """Returns once the holder is known to be gone. Raises UserError if it is alive."""
    current = _parse(content)
    who = _describe(current)
    in_use = UserError(f"--workdir: '{workdir}' is in use by {who}; stop it, or use another --workdir")
    if current and _machine().items() <= current.items():
        pid, started = current.get("pid"), current.get("started")
        if type(pid) is int and pid > 0 and started is not None and _start_time(pid) == started:
            raise in_use
    else:
        log(f"'{workdir}' was in use by {who}; waiting {stale:.0f} s to see whether it still is")
        end = time.monotonic() + stale
        while time.monotonic() < end:
            time.sleep(min(0.2, stale))
            if (now := _read(workdir / _NAME)) is None:
                return
            if now != content:
                raise in_use
    log(f"taking over '{workdir}' from {who}, which is gone")


def _parse(content: bytes | None) -> dict[str, Any]:
    """The holder in a lease; empty for a damaged lease and for none."""
    try:
        values = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _describe(values: dict[str, Any]) -> str:
    def field(name: str) -> str:
        return "".join(c for c in str(values.get(name, "?")) if c.isprintable())[:80]

    return f"process {field('pid')} on {field('host')} since {field('since')}" if values else "an unknown holder"


def _machine() -> dict[str, str]:
    """The scope in which a process id is unique: host, boot and, in containers, the process namespace."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"
    boot_id = boot.read_text().strip() if boot.exists() else ""
    processes = os.readlink(namespace) if os.path.islink(namespace) else ""
    return {"host": socket.gethostname(), "boot": boot_id, "processes": processes}


def _start_time(pid: int) -> str | None:
    """When a process started, which tells it from a later one with the same id; None if it is gone or a zombie, empty
    if the system has no /proc."""
    try:
        if not os.path.exists("/proc/self/stat"):
            with contextlib.suppress(PermissionError):  # a process of another user
                os.kill(pid, 0)
            return ""
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


@retrying
def _read(file: gcs.AnyPath) -> bytes | None:
    """Reads the first 64 KiB; None if there is no file. Raises OSError for a link, and does not wait for a pipe."""
    if not isinstance(file, Path):
        return gcs.read(file)[0]
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        return os.read(descriptor, _MAX_BYTES)
    finally:
        os.close(descriptor)


def _replace(file: gcs.AnyPath, expected: bytes | None, content: bytes | None, run_id: str) -> bool:
    """Replaces the file if its content is still as expected; None: there is no file. Returns False if it has changed.

    Args:
      run_id: of this job, as no other job has it.
    """
    if not isinstance(file, Path):
        current, generation = gcs.read(file)
        return current == expected and gcs.write(file, content, generation)
    temporary = file.with_name(f"{file.name}.{run_id}")
    folder, has_lock = os.open(file.parent, os.O_RDONLY), False
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
            has_lock = True
        if _read(file) != expected:
            return False
        if content is None:
            file.unlink()
            return True
        temporary.write_bytes(content)
        if not has_lock and _parse(expected).get("run_id") != run_id:
            return _replace_without_lock(file, expected, temporary)
        temporary.replace(file)
        return True
    finally:
        temporary.unlink(missing_ok=True)
        os.close(folder)


def _replace_without_lock(file: Path, expected: bytes | None, temporary: Path) -> bool:
    """Replaces a file on a file system without locks: one job can move the old file away, and one can link a new file.

    A job that has moved a newer file than expected links it again. If a third job links its file in between, the
    owner of the newer file notices within `_SETTLE_SECONDS`, before it starts.
    """
    if expected is not None:
        old = temporary.with_name(f"{temporary.name}.old")
        try:
            file.rename(old)
        except FileNotFoundError:
            return False
        try:
            if old.read_bytes() != expected:
                _link(old, file)
                return False
        finally:
            old.unlink()
    if not _link(temporary, file):
        return False
    time.sleep(_SETTLE_SECONDS)
    return True


def _link(file: Path, name: Path) -> bool:
    """Gives a file another name; False if the name exists."""
    with contextlib.suppress(FileExistsError):
        os.link(file, name)
        return True
    return False
