"""Runs `train` in a subprocess for a sweep, and stops it with the sweep."""

import contextlib
import ctypes
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_mlm.errors import PREEMPTED, UserError

# The environment before environment.prepare changes it for the base config: each run prepares its own.
_ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}
LOG = "train.log"  # the output of all starts of a run
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # <sys/prctl.h>


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[int]:
    """Makes a folder and locks it. Processes that inherit the yielded descriptor hold the lock too.

    Raises:
      UserError: the folder is locked, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"--workdir: '{folder}' cannot be used: {e.strerror}") from e
    try:
        with contextlib.suppress(OSError):  # a file system without locks; train has a lease
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"--workdir: '{folder}' is in use by another sweep, or by a run of one") from None
        yield descriptor
    finally:
        os.close(descriptor)


class Trainer:
    """Runs `train` in a subprocess and passes SIGTERM and SIGINT on to it: it saves, and exits with 75.

    Attributes:
      stopped: True after such a signal.
    """

    def __init__(self, lock: int):
        """Handles the signals; runs inherit the descriptor `lock`."""
        self.stopped, self._lock = False, lock
        self._process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, _: Any) -> None:
        self.stopped = True
        name = signal.Signals(number).name
        print(f"{name}: the run saves and stops; a second signal stops it at once", file=sys.stderr)
        if self._process:
            self._process.send_signal(number)

    def train(self, workdir: Path, arguments: list[str]) -> int:
        """Trains to the end, with the output in WORKDIR/train.log. Returns the exit code."""
        if self.stopped:
            return PREEMPTED
        workdir.mkdir(exist_ok=True)
        line = [sys.executable, "-m", "flax_mlm.train", *arguments]
        with (workdir / LOG).open("a") as log:
            print(f"$ {shlex.join(line)}", file=log, flush=True)
            self._process = process = subprocess.Popen(
                line, env=_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[self._lock],
                start_new_session=True,  # otherwise Ctrl-C reaches it twice
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip
            if self.stopped:  # the signal came before there was a process
                process.terminate()
            return process.wait()


def _end_with_parent() -> None:
    """Asks Linux to send this process SIGTERM when the sweep is killed."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def failure_reason(workdir: Path, code: int) -> str:
    """The signal that ended a run, or the error message in its log."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    log = workdir / LOG
    last_start = re.split(r"^\$ .*\n", log.read_text(errors="replace"), flags=re.MULTILINE)[-1]
    lines = [line.strip() for line in last_start.splitlines() if line.strip()] or ["no output"]
    messages = [line for line in lines if line.startswith(("error: ", "stopped: "))] or lines
    return f"{re.sub('^(error|stopped): ', '', messages[-1])} (exit code {code}; {log})"
