"""Signals that stop a run: SIGTERM (a preemption), SIGINT (Ctrl-C) and SIGHUP (its terminal is gone)."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, Self

from flax_mlm.errors import PREEMPTED

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """Raised during an evaluation when a signal has asked the run to stop."""


def leave(reason: str) -> NoReturn:
    """Ends the process with the exit code that asks for a restart; callable from any thread."""
    print(reason, file=sys.stderr, flush=True)
    os._exit(PREEMPTED)


def stop_signals() -> list[signal.Signals]:
    """Lists the signals that stop a run: SIGHUP not where it is ignored, as under nohup."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in _SIGNALS if not (number == signal.SIGHUP and is_ignored)]


class Stop:
    """Handles SIGTERM, SIGINT and SIGHUP inside a `with` block, and restores the previous handlers after it.

    Between `hold` and `release` the first signal only sets `requested`, so that the caller can save and return.
    Outside that interval it ends the process at once. A second SIGTERM or SIGINT always ends the process at once;
    SIGHUP counts for neither, since terminals, shells and service managers send it several times, or with a SIGTERM.
    Where it is ignored (nohup), it stays so. Python allows signal handlers only in the main thread: in any other thread
    the block changes nothing, and the program that owns the main thread may set `requested`.

    Attributes:
      requested: true after the first signal.
      leave: ends the process with a reason; called from another thread, and may be replaced.
    """

    def __init__(self) -> None:
        self.requested = False
        self.leave: Callable[[str], None] = leave
        self._has_unsaved_work, self._is_saved, self._is_warned = False, False, False

    def __enter__(self) -> Self:
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            # Python runs handlers between bytecodes of the main thread, which may compile for minutes. The C handler
            # writes the signal's number to this socket at once, and a thread reads it.
            read, self._write = socket.socketpair()
            self._write.setblocking(False)
            self._previous = {number: signal.signal(number, lambda *_: None) for number in stop_signals()}
            self._previous_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._handles:
            signal.set_wakeup_fd(self._previous_fd)
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._write.close()  # ends the thread
            self._thread.join()

    def _watch(self, read: socket.socket) -> None:
        with read:
            while number := read.recv(1):
                if number[0] in _SIGNALS:
                    self._handle(number[0])

    def _handle(self, number: int) -> None:
        name, is_hangup = signal.Signals(number).name, number == signal.SIGHUP
        if self._is_warned and not is_hangup:
            os._exit(128 + number)
        is_first, self.requested = not self.requested, True
        self._is_warned = self._is_warned or not is_hangup
        if not self._has_unsaved_work:
            self.leave(f"{name}: {'the last step is saved' if self._is_saved else 'there is nothing to save'}")
        if is_first:
            print(f"{name}: saving, then leaving; a second one leaves at once", file=sys.stderr, flush=True)

    def hold(self) -> None:
        """Starts the interval in which a signal must not end the process before a save."""
        self._has_unsaved_work = True

    def release(self) -> None:
        """Ends the interval that `hold` started: all work is saved."""
        self._has_unsaved_work, self._is_saved = False, True
        if self.requested:
            self.leave("stopped by a signal; the last step is saved")
