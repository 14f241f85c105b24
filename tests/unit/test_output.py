"""stdout that cannot be written, and the status line of a terminal."""

import contextlib
import errno
import fcntl
import io
import os
import pty
import select
import struct
import subprocess
import sys
import termios

import pytest
from rich.progress import Progress

from flax_mlm.cli import output


@pytest.fixture
def stdout(monkeypatch):
    """Makes a file or descriptor sys.stdout, as Python opens it."""
    opened = contextlib.ExitStack()

    def replace(file: object, **options: object) -> io.TextIOWrapper:
        stream = open(file, "w", **options)  # noqa: SIM115
        opened.push(contextlib.suppress(OSError))
        opened.callback(stream.close)
        monkeypatch.setattr(sys, "stdout", stream)
        return stream

    yield replace
    opened.close()


@pytest.fixture
def pipe():
    read, write = os.pipe()
    yield read, write
    os.close(read)


def test_a_full_disk_is_no_error_of_a_run(stdout):
    stdout("/dev/full")
    with output.guarded():
        print("step 1", flush=True)
        print("x" * 10**6, flush=True)


def test_a_full_disk_is_the_error_of_a_command_that_prints_its_result(stdout):
    stdout("/dev/full")
    with output.guarded(is_log=False):
        print("accuracy 0.5")
        assert output.loss().errno == errno.ENOSPC


@pytest.mark.parametrize("arguments", [["", "--help"], [".train", "--print_config"], [".train", "--help"]])
def test_help_and_configs_are_results(arguments):
    line = [sys.executable, "-m", f"flax_mlm{arguments[0]}", arguments[1]]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "stopped: stdout cannot be written: No space left on device\n")


def test_a_closed_pipe_is_no_error_of_a_run(stdout):
    read, write = os.pipe()
    os.close(read)
    stdout(write, closefd=False)
    with output.guarded():
        print("step 1", flush=True)
        assert output.loss().errno == errno.EPIPE
    os.close(write)


def test_a_run_does_not_wait_for_ever_for_who_does_not_read(stdout, pipe, monkeypatch):
    monkeypatch.setattr(output, "_PATIENCE", 0.01)
    stdout(pipe[1])
    with output.guarded():
        for step in range(20_000):
            print(f"step {step}", flush=True)
        os.set_blocking(pipe[0], False)
        assert os.read(pipe[0], 10**6).startswith(b"step 0\n")
        print("the last line", flush=True)
        os.read(pipe[0], 10**6)
        assert output.loss(), "lines are missing between"
        assert os.read(pipe[0], 10**6).endswith(b"the last line\n")


def test_the_other_owner_of_a_pipe_still_waits(stdout, pipe):
    stdout(pipe[1])
    with output.guarded():
        print("step 1", flush=True)
        assert os.get_blocking(pipe[1])


def test_lines_that_cannot_be_written_come_later(stdout, pipe, monkeypatch):
    monkeypatch.setattr(output, "_PATIENCE", 0.01)
    stdout(pipe[1])
    size = fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 4096)
    with output.guarded():
        print("x" * size, "step 1", flush=True)
        assert os.read(pipe[0], size) == b"x" * size
        assert output.loss() is None
        assert os.read(pipe[0], size) == b" step 1\n"


def test_a_character_that_the_encoding_lacks_is_no_error(stdout, tmp_path):
    stdout(tmp_path / "log", encoding="ascii")
    with output.guarded():
        print("devices 8 × cpu")
    assert (tmp_path / "log").read_text() == "devices 8 \\xd7 cpu\n"


def test_nothing_is_changed_afterwards(stdout, tmp_path):
    stream = stdout(tmp_path / "log")
    print("before")
    with output.guarded(), output.guarded():
        print("inside")
    print("after", flush=True)
    assert sys.stdout is stream
    assert (tmp_path / "log").read_text() == "before\ninside\nafter\n"


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path, closed):
    line = "import sys; from flax_mlm.cli import output; g = output.guarded(); g.__enter__()"
    line += f"; f = open('{tmp_path}/file', 'w'); print(1); print(2, file=sys.stderr); f.write(str(f.fileno()))"
    code = subprocess.run(f'{sys.executable} -c "{line}" {closed}', shell=True).returncode
    assert code == 0
    assert int((tmp_path / "file").read_text()) > 2


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 40 columns: its descriptor, and a function that reads what it shows up to a text."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    monkeypatch.setattr(output, "_INTERVAL", 1000.0)  # only a test draws

    def shown(end: str) -> str:
        text = b""
        while not text.endswith(end.encode()) and select.select([master], [], [], 10)[0]:
            text += os.read(master, 10**6)
        return text.decode()

    yield slave, shown
    os.close(master)


ERASE = "\r\x1b[2K"


def test_lines_go_above_the_status_line(terminal, stdout, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    descriptor, shown = terminal
    stdout(descriptor)
    with output.guarded(), output.Status(lambda columns: "compiling".ljust(100, ".")) as status:
        status.draw()
        print("step 1")
        status.draw()
    line = ERASE + "compiling".ljust(39, ".")
    expected = f"{line}{ERASE}step 1\r\n{line}{ERASE}"
    assert shown(expected) == expected


def test_of_status_lines_inside_one_another_the_innermost_is_drawn(terminal, stdout):
    descriptor, shown = terminal
    stdout(descriptor)
    with output.guarded(), output.Status(lambda columns: "train") as outer:
        with output.Status(lambda columns: "compiling") as inner:
            outer.draw()
            inner.draw()
        outer.draw()
    expected = f"{ERASE}compiling{ERASE}{ERASE}train{ERASE}"
    assert shown(expected) == expected


def test_a_bar_of_rich_takes_the_place_of_the_status_line(terminal, stdout):
    descriptor, shown = terminal
    stdout(descriptor)
    with output.guarded(), output.Status(lambda columns: "prepare") as status:
        with Progress(transient=True, auto_refresh=False) as bar:
            bar.add_task("tokenising")
            bar.refresh()
            status.draw()
        status.draw()
    text = shown(f"prepare{ERASE}")
    assert text.count("prepare") == 1
    assert "tokenising" in text


def test_no_status_line_is_put_into_half_a_line(terminal, stdout):
    descriptor, shown = terminal
    stdout(descriptor)
    with output.guarded(), output.Status(lambda columns: "compiling") as status:
        print("waiting ", end="", flush=True)
        status.draw()
        print("for a batch")
    expected = "waiting for a batch\r\n"
    assert shown(expected) == expected


def test_a_terminal_that_cannot_erase_gets_no_status_line(terminal, stdout, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    descriptor, shown = terminal
    stdout(descriptor)
    with output.guarded(), output.Status(lambda columns: "compiling") as status:
        status.draw()
        print("step 1", flush=True)
    assert shown("step 1\r\n") == "step 1\r\n"


def test_a_file_gets_no_status_line(stdout, tmp_path):
    stdout(tmp_path / "log")
    with output.guarded(), output.Status(lambda columns: "compiling") as status:
        status.draw()
        print("step 1", flush=True)
    assert (tmp_path / "log").read_text() == "step 1\n"


def test_a_terminal_that_is_gone_is_no_error(stdout):
    master, slave = pty.openpty()
    stdout(slave)
    os.close(master)
    with output.guarded(), output.Status(lambda columns: "compiling") as status:
        status.draw()
        print("step 1", flush=True)
        assert output.loss().errno == errno.EIO
