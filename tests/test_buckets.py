"""Runs whose workdir, checkpoints and corpus lie in a bucket, with fake_gcs.py for Cloud Storage."""

from pathlib import Path

import pytest
from fake_gcs import FakeGcs
from faults.runs import assert_same_run, finish

STEPS = 30
SHORT = {"train__steps": STEPS, "train__checkpoint_every": 10, "train__eval_every": 20, "train__keep_last": 2}


@pytest.fixture(scope="module")
def server():
    with FakeGcs("bucket", "other") as gcs, pytest.MonkeyPatch.context() as patch:
        for name, value in gcs.env.items():
            patch.setenv(name, value)
        yield gcs


@pytest.fixture
def gcs(server):
    yield server
    server.fault = None


@pytest.fixture(scope="module")
def straight(toy) -> Path:
    workdir = toy.folder / "straight in a folder"
    finish(toy, workdir, *toy.flags(**SHORT))
    return workdir


def local(gcs: FakeGcs, prefix: str, folder: Path) -> Path:
    """What is under a prefix of the bucket, as files."""
    for name in gcs.names("bucket", prefix + "/"):
        file = folder / name.removeprefix(prefix + "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gcs.buckets["bucket"][name].content)
    return folder


def test_a_run_in_a_bucket_is_that_in_a_folder(toy, straight, gcs, tmp_path):
    out = finish(toy, "gs://bucket/runs/first", *toy.flags(**SHORT, log__tensorboard=True))
    print(out)
    print(gcs.names("bucket"))
    assert_same_run(local(gcs, "runs/first", tmp_path), straight, STEPS)
