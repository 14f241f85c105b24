"""A person's side of a run on the stand-in for Google Cloud: a job file, and a shell."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.fake_cloud import BUCKET, FakeCloud
from tests.helpers.paths import ROOT

needs_gcloud = pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
JOB = {"RUN": "run", "PROJECT": "p", "ZONE": "us-central1-a", "TPU": "v5e:2x4", "BUCKET": BUCKET}


class Desk:
    """A person's side: a job file and a shell."""

    def __init__(self, cloud: FakeCloud):
        self.cloud, self.job = cloud, cloud.folder / "job.env"
        self.env = cloud.env | {"VENV": str(Path(sys.executable).parent.parent)}
        self.write()

    def write(self, **changes: object) -> None:
        self.job.write_text("".join(f"{k}={v}\n" for k, v in {**JOB, **changes}.items()))

    def train(self, script: str) -> None:
        """What the machines run instead of training."""
        (self.cloud.folder / "train").write_text(script)

    def start(self, verb: str, *arguments: str, **env: str) -> subprocess.Popen:
        line = ["bash", "launch/tpu.sh", verb, str(self.job), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            line, env=self.env | env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, verb: str, *arguments: str, code: int = 0, **env: str) -> str:
        process = self.start(verb, *arguments, **env)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, f"{verb}: {process.returncode}\n{out}\n{err}\n{self.cloud.logs()}"
        return out + err


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def nothing_is_left(desk: Desk) -> bool:
    return not desk.cloud.queued and not desk.cloud.nodes


def until(condition: Callable[[], object], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
