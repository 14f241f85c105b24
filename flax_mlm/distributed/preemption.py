"""SIGTERM (a preemption) and SIGINT (Ctrl-C): save what is worth saving, then leave."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from flax_mlm.errors import PREEMPTED


class Stopped(Exception):
    """Raised in the middle of an evaluation when the run is to end."""


def leave(reason: str) -> NoReturn:
    """Ends the process as one to be started again."""
    print(reason, file=sys.stderr, flush=True)
    os._exit(PREEMPTED)


class Stop:
    """The wish to end this process. Before `hold` and after `release` a first signal leaves at once; in between it is
    only noted, in `requested`. A second one always leaves at once."""

    def __init__(self) -> None:
        """Python runs signal handlers between two bytecodes of the main thread, which may sit in a compilation for
        minutes: so a thread of our own waits for signals, by the pipe that the C handler writes to.
        """
        self.requested, self._held = False, False
        self.leave: Callable[[str], None] = leave  # may be replaced; is called from another thread
        read, write = socket.socketpair()
        write.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # a handler in Python is what makes C write to the pipe
        signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read, write), name="signals", daemon=True).start()

    def _watch(self, read: socket.socket, _: socket.socket) -> None:
        while True:
            number = read.recv(1)[0]
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            name = signal.Signals(number).name
            if self.requested:
                os._exit(128 + number)
            self.requested = True
            if not self._held:
                self.leave(f"{name}: there is nothing to save")
            print(f"{name}: saving, then leaving; a second one leaves at once", file=sys.stderr, flush=True)

    def hold(self) -> None:
        """From now on there is work that would be lost."""
        self._held = True

    def release(self) -> None:
        """The work is saved."""
        self._held = False
        if self.requested:
            self.leave("stopped by a signal; the last step is saved")
