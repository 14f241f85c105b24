"""`prepare` of every kind of source, killed at random and started again: the corpus has the bytes of an undisturbed
one."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.fake_s3 import FakeS3
from tests.helpers.kinds_of_source import KINDS
from tests.helpers.paths import ROOT
from tests.helpers.preparing import SCRIPT, contents, wait_for_workers

UNIT_BYTES = 12_000
QUICK = {("text", "near"), ("parquet", "none"), ("joined", "near")}  # in every run of the suite
DEADLINE = 120.0


def cases() -> list[object]:
    every = [(kind, dedup) for kind in KINDS for dedup in ("none", "near")]
    return [pytest.param(*case, id=" ".join(case), marks=() if case in QUICK else pytest.mark.full) for case in every]


class Preparing:
    """Runs of one `prepare`, as processes of their own."""

    def __init__(self, folder: Path, changes: dict, env: dict[str, str]):
        self.folder, self.env = folder, {**os.environ, **env}
        self.script = folder / "script.py"
        settings = {"root": str(ROOT), "changes": json.dumps(changes), "unit_bytes": UNIT_BYTES}
        self.script.write_text(SCRIPT.format(**settings))

    @contextlib.contextmanager
    def running(self, output: Path) -> Iterator[subprocess.Popen]:
        log = (self.folder / f"{output.name}.log").open("a")
        process = subprocess.Popen(
            [sys.executable, str(self.script), str(output)],
            stdout=log, stderr=subprocess.STDOUT, env=self.env, start_new_session=True,
        )  # fmt: skip
        try:
            with log:
                yield process
        finally:
            process.kill()
            process.wait()
            wait_for_workers(process.pid)

    def finish(self, output: Path) -> int:
        """Lets a run end. Returns the largest number of files that its folder of unfinished work had."""
        with self.running(output) as process:
            most = self._watch(process, output, sys.maxsize)
        assert process.returncode == 0, self.log(output)
        return most

    def kill(self, output: Path, num_files: int, seconds: float) -> bool:
        """Kills a run so many seconds after so much is done; False: it has ended before."""
        with self.running(output) as process:
            self._watch(process, output, num_files)
            time.sleep(seconds)
            process.kill()
            process.wait()
        assert process.returncode in (0, -signal.SIGKILL), self.log(output)
        return process.returncode != 0

    def log(self, output: Path) -> str:
        return (self.folder / f"{output.name}.log").read_text()

    def _watch(self, process: subprocess.Popen, output: Path, num_files: int) -> int:
        most, deadline = 0, time.monotonic() + DEADLINE
        while process.poll() is None and most < num_files:
            assert time.monotonic() < deadline, self.log(output)
            most = max(most, num_files_in(unfinished(output)))
            time.sleep(0.002)
        return most


def unfinished(output: Path) -> Path:
    return output.with_name(output.name + ".tmp")


def num_files_in(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


@pytest.fixture
def env(request, monkeypatch) -> Iterator[dict[str, str]]:
    """Environment variables of the processes; where the source is in a bucket, those that point to a stand-in."""
    if request.node.callspec.params["kind"] != "s3":
        yield {}
        return
    pytest.importorskip("moto")
    with FakeS3("bucket") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        yield server.env


@pytest.mark.parametrize(("kind", "dedup"), cases())
def test_killed_at_random_and_started_again(tmp_path, env, kind, dedup):
    (tmp_path / "source").mkdir()
    changes = {**KINDS[kind](tmp_path / "source"), "data.dedup": dedup}
    run = Preparing(tmp_path, changes, {**env, **changes.pop("env", {})})
    total = run.finish(tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed")
    assert len([name for name in expected if name.startswith("train-") and "crc32" not in name]) > 4

    rng, output, kills = random.Random(f"{kind} {dedup}"), tmp_path / "killed", 0
    while kills < (2 if (kind, dedup) in QUICK else 4):
        done = num_files_in(unfinished(output))
        if not run.kill(output, done + rng.randint(0, max(1, total - done)), rng.uniform(0, 0.1)):
            break
        kills += 1
    run.finish(output)
    assert kills
    assert contents(output) == expected
    assert not unfinished(output).exists()
    if dedup == "near":
        report = json.loads((output / "cleaning.json").read_text())
        assert sum(report["documents_dropped"].values()) > 5
