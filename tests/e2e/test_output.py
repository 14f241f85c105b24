"""Runs whose terminal or log is narrow, full, closed or gone."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading

import pytest

from flax_mlm.checkpoint.store import saved_steps
from tests.helpers.runs import PATIENCE

SHORT = {"train__steps": 40, "train__checkpoint_every": 20, "train__eval_every": 20, "eval__max_rows": 16}


class Terminal:
    """A terminal of 80 columns, and what it has shown; commands write to `descriptor`."""

    def __init__(self):
        self.text, (self._master, self.descriptor) = "", pty.openpty()
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while part := os.read(self._master, 10**6).decode():
                with self._changed:
                    self.text += part
                    self._changed.notify_all()

    def wait_for(self, text: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.text, PATIENCE), self.text

    def close(self) -> str:
        """Ends the terminal when nobody writes to it any more; returns what it has shown."""
        os.close(self.descriptor)
        self._thread.join()
        os.close(self._master)
        return self.text

    def go(self) -> None:
        """Lets the terminal vanish from under those who write to it."""
        os.close(self.descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), self._master)


def test_on_80_columns(toy, tmp_path):
    """Lines fit, commands can be copied, and the bar ends at 100% and goes."""
    terminal, workdir = Terminal(), tmp_path / "a folder whose name is so long that its lines do not fit in 80 columns"
    process = toy.start("train", f"--workdir={workdir}", *toy.flags(**SHORT), stdout=terminal.descriptor)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    text = terminal.close()
    lines = [re.split(r"\r?\x1b\[2K", line)[-1] for line in text.split("\r\n")]
    steps = [line for line in lines if line.startswith("step ") and "validation" not in line]
    assert len(steps) == 40
    assert max(map(len, steps)) <= 80
    assert "tokens/s" not in steps[0], "it compiles"
    assert all(re.search(r"loss \d.*tokens/s .*eta ", line) for line in steps[1:])
    assert f"    python -m flax_mlm.evaluate '--checkpoint={workdir}' --task=mlm" in lines
    drawn = re.findall(r"\r\x1b\[2K([^\r]+)(?=\r\x1b)", text)
    assert max(map(len, drawn)) < 80
    assert any(re.match(r"\[=+\] +100%  step 40/40  loss .*tokens/s .*eta 0:00:00", line) for line in drawn)
    assert "compiling   the train step" in lines
    assert not text.split("\x1b[2K")[-1].startswith("["), "no bar stays, however fast the last lines follow it"
    assert {"grad_norm", "data_wait"} <= json.loads((workdir / "metrics.jsonl").read_text().splitlines()[1]).keys()


def closed_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("stdout", [closed_pipe, full_disk])
def test_a_log_that_cannot_be_written_changes_no_run(toy, tmp_path, stdout):
    process = toy.start("train", f"--workdir={tmp_path / 'run'}", *toy.flags(**SHORT), stdout=stdout())
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert re.fullmatch(r"WARNING: stdout cannot be written: [^\n]*; the run goes on, [^\n]*\n", err)
    assert saved_steps(tmp_path / "run") == [20, 40]
    assert (tmp_path / "run" / "result.json").exists()


def test_a_result_that_cannot_be_written_is_a_failure(toy, trained_run):
    arguments = [f"--checkpoint={trained_run}", "The [MASK] sleeps."]
    process = toy.start("fill_mask", *arguments, stdout=full_disk())
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert err == "stopped: stdout cannot be written: No space left on device\n"
    process = toy.start("fill_mask", *arguments, stdout=closed_pipe())
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (1, "")


def test_a_run_whose_terminal_is_gone_saves(toy, tmp_path):
    workdir, flags = tmp_path / "run", toy.flags(**SHORT | {"train__steps": 5000})
    terminal = Terminal()
    process = toy.start("train", f"--workdir={workdir}", *flags, stdout=terminal.descriptor)
    terminal.wait_for("step 30/")
    terminal.go()
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, err
    assert "SIGHUP: saving, then leaving" in err
    assert saved_steps(workdir)[-1] >= 30


def test_a_run_under_nohup_goes_on(toy, tmp_path):
    flags = [f"--workdir={tmp_path / 'run'}", *toy.flags(**SHORT)]
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        line = ["nohup", sys.executable, "-m", "flax_mlm.train", *flags]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    finally:
        signal.signal(signal.SIGHUP, previous)
    for text in process.stdout:
        if text.startswith("step 10/"):
            process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE) == 0
