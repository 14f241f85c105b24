"""stdout and stderr whose failures never end a run, and a status line at the bottom of a terminal."""

import contextlib
import errno
import io
import os
import select
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

_KEPT = 2**16  # bytes that cannot be written now, and are written later
_PATIENCE = 10.0  # seconds that a run waits for the reader of its log
_INTERVAL = 0.5  # seconds between two drawings of the status line
_ERASE_LINE = b"\x1b[2K"
_ERASE = b"\r" + _ERASE_LINE

_lock = threading.RLock()  # terminals show both streams
_is_drawn = False  # a status line is on the screen
_innermost: "Status | None" = None  # the one that is drawn


class _Descriptor(io.RawIOBase):
    """A file descriptor to which writing never fails: bytes that cannot be written are kept for the next write.

    A log does not wait for long either: a pipe that nobody reads or a stopped terminal must not keep a run from saving.

    Attributes:
      loss: the error because of which bytes were dropped; None: none were.
      ends_line: true if nothing or a whole line was written last.
    """

    def __init__(self, number: int, is_log: bool):
        self._number, self._is_log = number, is_log
        self._target = _open_without_waiting(number) if is_log else number
        self._patience, self._unwritten = _PATIENCE, bytearray()
        self._error: OSError | None = None
        self.loss: OSError | None = None
        self.ends_line = True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        text = bytes(data)
        with _lock:
            is_first_error = self._error is None
            self._send(_erased(self) + text)
            self.ends_line = text.endswith((b"\n", _ERASE_LINE)) if text else self.ends_line  # rich ends its bars so
        if self._error and is_first_error and self._is_log and self._number == 1:
            what = f"stdout cannot be written: {self._error.strerror}"
            print(f"WARNING: {what}; the run goes on, and lines of its log may be missing", file=sys.stderr)
        return len(data)

    def draw(self, line: bytes) -> None:
        """Writes a status line, unless other output waits."""
        global _is_drawn
        with _lock:
            if not self._unwritten:
                self._send(line)
                _is_drawn = True

    def try_again(self) -> OSError | None:
        """Writes the bytes that were kept. Returns the error because of which some are missing."""
        with _lock:
            self._send(b"")
            return self.loss or (self._error if self._unwritten else None)

    def _send(self, data: bytes) -> None:
        self._unwritten += data
        while self._unwritten:
            try:
                written = os.write(self._target, self._unwritten)
            except BlockingIOError as e:
                if not self._waits():
                    self._error = OSError(e.errno, "nobody reads it")
                    break
            except OSError as e:
                self._error = e
                break
            else:
                del self._unwritten[:written]
                self._patience = _PATIENCE
        if len(self._unwritten) > _KEPT:
            self.loss = self._error
            del self._unwritten[:-_KEPT]

    def _waits(self) -> bool:
        """Waits until the descriptor takes bytes; for a log not for ever, and only once for each reader that stops."""
        poll = select.poll()
        poll.register(self._target, select.POLLOUT)
        ready = poll.poll(1000 * self._patience if self._is_log else None)
        self._patience = _PATIENCE if ready else 0.0
        return bool(ready)

    def close(self) -> None:
        if not self.closed and self._target != self._number:
            os.close(self._target)
        super().close()


def _open_without_waiting(number: int) -> int:
    """Opens a pipe or terminal once more: other programs share the descriptor's flags, and may want to wait."""
    if os.isatty(number) or stat.S_ISFIFO(os.fstat(number).st_mode):
        with contextlib.suppress(OSError):
            return os.open(f"/dev/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return number


def _erased(descriptor: _Descriptor) -> bytes:
    """Codes that erase the status line if it is on the terminal of this descriptor."""
    global _is_drawn
    if not (_is_drawn and descriptor.isatty()):
        return b""
    _is_drawn = False
    return _ERASE


def _descriptor(stream: Any) -> _Descriptor | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Descriptor) else None


@contextlib.contextmanager
def guarded(is_log: bool = True) -> Iterator[None]:
    """Keeps failures of stdout and stderr from the block: a full disk, a reader that has exited, a terminal that is
    gone, a closed descriptor, an encoding without a character. Streams that are not those of the process (a notebook's)
    are left alone.

    Args:
      is_log: stdout is the log of a run, which may lose lines, and not its result.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: a file of the run must not get this number, to which libraries write messages
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    try:
        sys.stdout, sys.stderr = (_guard(stream, is_log) for stream in before)
        yield
    finally:
        for stream, own in zip((sys.stdout, sys.stderr), before, strict=True):
            if stream is not own and (descriptor := _descriptor(stream)):
                stream.flush()
                descriptor.try_again()
        sys.stdout, sys.stderr = before


def _guard(stream: Any, is_log: bool) -> Any:
    if stream is None:  # it was closed when Python started
        return open(os.devnull, "w")
    if not isinstance(getattr(stream, "buffer", None), io.BufferedWriter | io.FileIO) or _descriptor(stream):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    is_unbuffered = isinstance(stream.buffer, io.FileIO)
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(stream.fileno(), is_log)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or is_unbuffered,
        write_through=stream.write_through,
    )


def loss() -> OSError | None:
    """Writes what stdout has not taken yet. Returns the error because of which output is missing; None: nothing is."""
    sys.stdout.flush()
    descriptor = _descriptor(sys.stdout)
    return descriptor.try_again() if descriptor else None


def exit_code(code: int) -> int:
    """Returns the exit code of a command that prints its result: 1 instead of 0 where stdout does not take it. A line
    on stderr says why, unless the reader (head, grep -q) has exited."""
    if (error := loss()) and error.errno != errno.EPIPE:
        print(f"stopped: stdout cannot be written: {error.strerror}", file=sys.stderr)
    return code or int(error is not None)


class Status:
    """A status line at the bottom of a terminal, drawn twice a second in a `with` block; other output goes above it.

    Of blocks inside one another, the innermost is drawn. A progress bar of rich is drawn in its place.
    """

    def __init__(self, line: Callable[[int], str]):
        """`line` takes the number of columns."""
        self._line, self._ended = line, threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)
        self._descriptor: _Descriptor | None = None

    def __enter__(self) -> Self:
        global _innermost
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and (descriptor := _descriptor(sys.stdout)):
            self._descriptor = descriptor
            self._thread.start()
        self._outer, _innermost = _innermost, self
        return self

    def draw(self) -> None:
        """Draws the line now."""
        if (
            self._descriptor
            and _innermost is self
            and all(d.ends_line for d in map(_descriptor, (sys.stdout, sys.stderr)) if d)
        ):
            columns = shutil.get_terminal_size().columns - 1  # the last one makes some terminals wrap
            text = self._line(columns)[:columns]
            self._descriptor.draw(_ERASE + text.encode(sys.stdout.encoding, "replace"))

    def _run(self) -> None:
        while not self._ended.wait(_INTERVAL):
            self.draw()

    def __exit__(self, *_: object) -> None:
        global _innermost
        _innermost = self._outer
        if self._descriptor:
            self._ended.set()
            self._thread.join()
            self._descriptor.write(b"")  # erases the line
