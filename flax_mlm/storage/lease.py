"""An exclusive lease on a workdir: two jobs that write to one run would spoil it.

`workdir/lease.json` says who holds it, and has a counter that moves every few seconds. Of a holder on this machine
the system is asked; one elsewhere is watched for a while, since the clocks of two machines cannot be compared.

To replace a lease only as long as it is the one that was read takes a lock in a folder; in a bucket it is what Cloud
Storage does when it is told a generation.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flax_mlm.errors import Failure, UserError
from flax_mlm.storage import gcs
from flax_mlm.storage.gcs import AnyPath

_FILE = "lease.json"
_BEAT = 5.0  # seconds
_STALE = 20.0  # seconds without a beat after which a holder elsewhere counts as gone
_SETTLE = 0.5  # seconds
_LIMIT = 1 << 16  # bytes that are looked at; a lease has some 300

Log = Callable[[str], None]


class Lease:
    """The lease on a folder, once it is taken; its counter then moves in a thread."""

    def __init__(self, workdir: AnyPath, run_id: str):
        """`run_id` is what tells this holder from all others."""
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._about = {**_machine(), "pid": os.getpid(), "started": _started(os.getpid())}
        self._about |= {"run_id": run_id, "since": since}
        self._workdir, self._run_id, self._beats, self._released = workdir, run_id, 0, threading.Event()
        self._place = _place(workdir)

    def take(self, log: Log, stale: float = _STALE) -> None:
        """Takes the lease. The folder is made when it is not there.

        Args:
          log: is told of a holder that is watched or replaced.
          stale: seconds without a beat after which a holder elsewhere counts as gone.

        Raises:
          UserError: another job holds it, or the folder cannot be written.
        """
        try:
            self._place.make()
            while True:
                content = self._place.read()
                if content is not None:
                    _wait_for_end(self._place, self._workdir, content, log, stale)
                if self._put(instead_of=content):
                    break
            self.check()
        except OSError as e:
            raise UserError(f"--workdir: '{self._workdir}' cannot be used: {e}") from e
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def check(self) -> None:
        """Raises UserError when another job has taken the lease, because this one seemed gone."""
        if (content := self._place.read()) is None or not _is_of(content, self._run_id):
            who = f"now belongs to {_name(_parse(content))}" if content else "has lost its lease.json"
            raise UserError(f"--workdir: '{self._workdir}' {who}; this job must not write to it any more")

    def release(self) -> None:
        """Gives the lease back, if it is still ours."""
        self._released.set()
        with contextlib.suppress(OSError, UserError, Failure):
            self._place.remove(self._run_id)

    def _put(self, instead_of: bytes | None) -> bool:
        return self._place.put(json.dumps({**self._about, "beats": self._beats}) + "\n", self._run_id, instead_of)

    def _beat(self) -> None:
        while not self._released.wait(_BEAT):
            with contextlib.suppress(OSError, UserError, Failure):  # a full disk, say: the next one may be written
                content = self._place.read()
                if content is None or not _is_of(content, self._run_id):
                    return
                self._beats += 1
                self._put(instead_of=content)


def holder(workdir: AnyPath) -> str:
    """The run_id of whoever holds the lease on a folder; empty when nobody does."""
    try:
        return str(_parse(_place(workdir).read() or b"").get("run_id", ""))
    except OSError:
        return ""


class _Folder:
    """Where a lease lies: a folder."""

    def __init__(self, workdir: Path):
        self._workdir = workdir

    def make(self) -> None:
        self._workdir.mkdir(parents=True, exist_ok=True)

    def read(self) -> bytes | None:
        try:  # neither follow a link nor wait for a pipe
            descriptor = os.open(self._workdir / _FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            return os.read(descriptor, _LIMIT)
        finally:
            os.close(descriptor)

    def put(self, content: str, run_id: str, instead_of: bytes | None) -> bool:
        """Puts the lease of `run_id` there, unless what is there has changed meanwhile."""
        lease, ours = self._workdir / _FILE, self._workdir / f"{_FILE}.{run_id}"
        with _locked(self._workdir) as locked:
            if self.read() != instead_of:
                return False
            try:
                ours.write_text(content)
                if locked or (instead_of is not None and _is_of(instead_of, run_id)):
                    ours.replace(lease)
                elif not self._put_unlocked(ours, lease, instead_of):
                    return False
            finally:
                ours.unlink(missing_ok=True)
        return True

    def _put_unlocked(self, ours: Path, lease: Path, instead_of: bytes | None) -> bool:
        """The same where the file system has no locks: of several, one moves the old lease away, and one links its own.

        Who finds that it moved a newer lease than it knew puts that back. Should a third have come in between, then
        the owner of the newer one sees so after `_SETTLE`, before it starts.
        """
        if instead_of is not None:
            old = ours.with_name(f"{ours.name}.old")
            try:
                lease.rename(old)
            except FileNotFoundError:
                return False
            try:
                if old.read_bytes() != instead_of:
                    _link(old, lease)
                    return False
            finally:
                old.unlink()
        if not _link(ours, lease):
            return False
        time.sleep(_SETTLE)
        return True

    def remove(self, run_id: str) -> None:
        """Removes the lease, if it is that of `run_id`."""
        with _locked(self._workdir):
            if _is_of(self.read() or b"", run_id):
                (self._workdir / _FILE).unlink()


class _Bucket:
    """The same in a bucket."""

    def __init__(self, workdir: AnyPath):
        self._lease = workdir / _FILE

    def make(self) -> None:
        pass

    def read(self) -> bytes | None:
        found = gcs.read(self._lease)
        return found and found[0]

    def put(self, content: str, run_id: str, instead_of: bytes | None) -> bool:
        held, generation = gcs.read(self._lease) or (None, 0)
        return held == instead_of and gcs.write(self._lease, content.encode(), generation)

    def remove(self, run_id: str) -> None:
        found = gcs.read(self._lease)
        if found and _is_of(found[0], run_id):
            gcs.delete(self._lease, found[1])


def _place(workdir: AnyPath) -> _Folder | _Bucket:
    return _Folder(workdir) if isinstance(workdir, Path) else _Bucket(workdir)


def _wait_for_end(place: _Folder | _Bucket, workdir: AnyPath, content: bytes, log: Log, stale: float) -> None:
    """Returns once the holder is known to be gone. Raises UserError when it is not."""
    about = _parse(content)
    who = _name(about)
    in_use = UserError(f"--workdir: '{workdir}' is in use by {who}; stop it, or use another --workdir")
    if about and _machine().items() <= about.items():
        if _is_alive(about.get("pid"), about.get("started")):
            raise in_use
    else:
        log(f"'{workdir}' was in use by {who}; waiting {stale:.0f} s to see whether it still is")
        end = time.monotonic() + stale
        while time.monotonic() < end:
            time.sleep(min(0.2, stale))
            if (now := place.read()) is None:
                return
            if now != content:
                raise in_use
    log(f"taking over '{workdir}' from {who}, which is gone")


def _parse(content: bytes) -> dict[str, Any]:
    try:
        about = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _is_of(content: bytes, run_id: str) -> bool:
    return _parse(content).get("run_id") == run_id


def _name(about: dict[str, Any]) -> str:
    def field(name: str) -> str:
        return "".join(c for c in str(about.get(name, "?")) if c.isprintable())[:80]

    return f"process {field('pid')} on {field('host')} since {field('since')}" if about else "an unknown holder"


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[bool]:
    """No other process compares and replaces the lease meanwhile; false where the file system has no locks."""
    descriptor = os.open(workdir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _link(file: Path, name: Path) -> bool:
    """Gives a file another name, unless that is taken."""
    try:
        os.link(file, name)
    except FileExistsError:
        return False
    return True


def _machine() -> dict[str, str]:
    """Where a process number means something: host, boot and, in containers, the namespace of processes."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "processes": os.readlink(namespace) if os.path.islink(namespace) else "",
    }


def _started(pid: int) -> str | None:
    """When a process started, so that it is not taken for a later one of the same number; None: it is gone, or has
    ended and waits for its parent; empty where the system does not say."""
    if not os.path.exists("/proc/self/stat"):
        return ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_alive(pid: Any, started: Any) -> bool:
    if type(pid) is not int or pid <= 0 or (now := _started(pid)) != started or now is None:
        return False
    with contextlib.suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True
