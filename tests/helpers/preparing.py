"""`prepare` in a process of its own, which is killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flax_mlm.config.load import build
from flax_mlm.config.schema import Config
from flax_mlm.configs import base
from flax_mlm.data import tokenising
from flax_mlm.data.prepare import prepare
from flax_mlm.data.sources import base as sources
from tests.helpers.paths import ROOT

SCRIPT = """
import json, sys
sys.path.insert(0, {root!r})
from tests.helpers.preparing import make
if __name__ == "__main__":
    make(json.loads({changes!r}), sys.argv[1], {unit_bytes}, print)
"""
_DEADLINE = 90.0


def config(changes: dict[str, Any]) -> Config:
    """The base config with small rows; {"data.x": 1} sets data.x."""
    c = base.get_config()
    c.data.update(seq_len=32, num_workers=1)
    c.tokenizer.vocab_size = 500
    for name, value in changes.items():
        section, _, field = name.partition(".")
        c[section][field] = value
    return build(c)


def make(changes: dict[str, Any], output: str | Path, unit_bytes: int, log: Any = lambda line: None) -> Path:
    """Prepares a corpus from small units."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sources, "UNIT_BYTES", unit_bytes)
        m.setattr(tokenising, "JOB_CHARS", max(1000, unit_bytes // 8))
        prepare(config(changes), output, log)
    return Path(output)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(folder: Path) -> dict[str, bytes]:
    """Contents of the shards alone."""
    return {name: data for name, data in contents(folder).items() if name.endswith(".npy")}


def check_kills(changes: dict[str, Any], folder: Path, unit_bytes: int, seen: tuple[str, ...]) -> None:
    """Kills a process that prepares once files that match each of `seen` are there, lets the last one finish, and
    compares the corpus with one that was made undisturbed."""
    expected = contents(make(changes, folder / "undisturbed", unit_bytes))
    script, output = folder / "script.py", folder / "killed"
    settings = {"root": str(ROOT), "changes": json.dumps(changes), "unit_bytes": unit_bytes}
    script.write_text(SCRIPT.format(**settings))
    for pattern in (*seen, ""):
        process = subprocess.Popen(
            [sys.executable, str(script), str(output)], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            _wait(process, output.with_name("killed.tmp"), pattern)
            log, _ = process.communicate(timeout=_DEADLINE)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == (-signal.SIGKILL if pattern else 0)
        wait_for_workers(process.pid)
        assert output.exists() == (not pattern)
    assert "units were finished before and are reused" in log
    assert contents(output) == expected


def _wait(process: subprocess.Popen[str], work: Path, pattern: str) -> None:
    deadline = time.monotonic() + _DEADLINE
    while pattern and not list(work.glob(pattern)) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.001)
    if pattern:
        process.kill()


def wait_for_workers(group: int) -> None:
    deadline = time.monotonic() + _DEADLINE
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("workers outlived their parent")
