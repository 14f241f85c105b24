"""The stand-in for Cloud Storage answers the three clients that matter as the real one does."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.fake_gcs import FakeGcs
from tests.helpers.paths import ROOT


@pytest.fixture
def gcs():
    with FakeGcs("bucket") as gcs:
        yield gcs


def python(gcs: FakeGcs, code: str) -> list:
    """Runs code in a process of its own, which prints JSON."""
    code = f"from flax_mlm.distributed import environment; environment.prepare_paths()\n{code}"
    env = {**os.environ, **gcs.env, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_gcsfs(gcs):
    gcs.page_size = 3
    found = python(
        gcs,
        """
import json, fsspec
fs = fsspec.filesystem("gs")
fs.pipe_file("bucket/run/a#1 b.txt", b"text")
with fs.open("bucket/run/big", "wb", block_size=1 << 18) as f:
    for i in range(12):
        f.write(bytes([i]) * (1 << 20))
said = [fs.cat_file("bucket/run/big", start=(5 << 20) - 1, end=(5 << 20) + 1).hex(), fs.size("bucket/run/big")]
try:
    fs.pipe_file("bucket/run/big", b"again", mode="create")
except FileExistsError:
    said.append("exists")
try:
    fs.cat_file("bucket/run/none")
except FileNotFoundError:
    said.append("none")
fs.copy("bucket/run/big", "bucket/run/copies/1")
fs.mv("bucket/run/copies/1", "bucket/run/moved/1")
for i in range(7):
    fs.pipe_file(f"bucket/run/many/{i}", bytes([i]))
said.append([name.removeprefix("bucket/run/") for name in fs.ls("bucket/run")])
said.append(len(fs.find("bucket/run")))
fs.rm("bucket/run/many", recursive=True)
fs.rm("bucket/run/moved", recursive=True)
print(json.dumps(said))
""",
    )
    assert found == ["0405", 12 << 20, "exists", "none", ["a#1 b.txt", "big", "many", "moved"], 10]
    assert gcs.names("bucket") == ["run/a#1 b.txt", "run/big"]
    assert gcs.buckets["bucket"]["run/a#1 b.txt"].content == b"text"


def test_orbax_and_tensorstore(gcs):
    found = python(
        gcs,
        """
import json, jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
from etils import epath
folder = epath.Path("gs://bucket/run/10")
tree = {"w": jnp.arange(100_000.0), "b": jnp.int32(3)}
with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))
with ocp.PyTreeCheckpointer() as checkpointer:
    again = checkpointer.restore(folder)
same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), tree, again)
print(json.dumps([same, folder.is_dir()]))
""",
    )
    assert found == [{"w": True, "b": True}, True]
    assert "run/10/commit_success.txt" in gcs.names("bucket")


def test_what_is_asked_to_fail_fails(gcs):
    gcs.fault = lambda method, bucket, name: 403 if name == "secret" else 0.01
    found = python(
        gcs,
        """
import json, fsspec
fs = fsspec.filesystem("gs")
fs.pipe_file("bucket/open", b"1")
try:
    fs.pipe_file("bucket/secret", b"1")
except OSError as e:
    print(json.dumps(str(e).split(":")[0]))
""",
    )
    assert found == "Forbidden"
    assert gcs.names("bucket") == ["open"]


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_gcloud(gcs, tmp_path):
    def gcloud(*arguments: object) -> tuple[int, str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | gcs.env
        line = ["gcloud", *map(str, arguments)]
        done = subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout.strip(), done.stderr

    (tmp_path / "small").write_text("text")
    (tmp_path / "large").write_bytes(os.urandom(20_000_000))
    create = "storage", "cp", "--if-generation-match=0", "small", "gs://bucket/a/small"
    assert gcloud(*create)[0] == 0
    code, _, err = gcloud(*create)
    assert code == 1
    assert "412" in err
    assert gcloud("storage", "cat", "gs://bucket/a/small")[:2] == (0, "text")
    assert gcloud("storage", "cp", "large", "gs://bucket/b/large")[0] == 0
    assert gcloud("storage", "cp", "gs://bucket/b/large", "back")[0] == 0
    assert (tmp_path / "back").read_bytes() == (tmp_path / "large").read_bytes()
    assert gcloud("storage", "ls", "gs://bucket/**")[1].split() == ["gs://bucket/a/small", "gs://bucket/b/large"]
    assert gcloud("storage", "buckets", "describe", "gs://bucket", "--format=value(location)")[1] == "US-CENTRAL1"
    assert gcloud("storage", "rm", "-r", "gs://bucket/b")[0] == 0
    assert gcs.names("bucket") == ["a/small"]
    code, _, err = gcloud("storage", "cat", "gs://bucket/none")
    assert code == 1
    assert "matched no objects" in err
