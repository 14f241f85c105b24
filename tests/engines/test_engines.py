"""A corpus made by shards, by Beam or by Ray, on disk or in a bucket: always the same bytes as by local `prepare`.

Tests of an engine run in its environment (bash launch/test.sh --engines), and are skipped elsewhere.
"""

import contextlib
import gzip
import hashlib
import importlib.util
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

ROOT = Path(__file__).parent.parent.parent
BEAM = ("--engine=beam", "--", "--direct_num_workers=2", "--direct_running_mode=multi_processing")
RAY = ("--engine=ray", "--", "--num_cpus=2")


def needs(package: str) -> pytest.MarkDecorator:
    reason = f"{package} is not installed; bash launch/test.sh --engines"
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=reason)


ENGINES = [
    pytest.param(BEAM, id="beam", marks=needs("apache_beam")),
    pytest.param(RAY, id="ray", marks=needs("ray")),
]
MAKERS = [pytest.param((), id="local"), *ENGINES]

# Every process of the tests reads this first, also the workers of an engine.
SMALL_UNITS = """
import flax_mlm.data.sources.base
flax_mlm.data.sources.base.UNIT_BYTES = 60_000
"""


def prose(seed: int, num_documents: int) -> str:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdeghilmnorst", k=rng.randint(2, 8))) for _ in range(1500)]
    return "\n\n".join(" ".join(rng.choices(words[: rng.randint(9, 1500)], k=300)) for _ in range(num_documents))


class Desk:
    """A folder with texts and a tokenizer, in which `prepare` is run in processes of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SMALL_UNITS)
        (folder / "text").mkdir()
        (folder / "text" / "a.txt").write_text(prose(0, 500))
        (folder / "text" / "b.txt.gz").write_bytes(gzip.compress(prose(1, 100).encode(), mtime=0))  # of several parts
        self.env = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder / 'site'}", "JAX_PLATFORMS": "cpu"}
        self.source = f"text:{folder / 'text' / '*'}"
        self.changes: tuple[str, ...] = ()

    def start(self, output: object, *arguments: str, python: str = sys.executable) -> subprocess.Popen[str]:
        """Starts `prepare` in a session of its own."""
        command = [python, "-m", "flax_mlm.prepare", "--config=base", f"--output={output}"]
        command += [f"--config.data.source={self.source}", "--config.data.seq_len=64", "--config.data.num_workers=1"]
        command += ["--config.tokenizer.vocab_size=500", *self.changes, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.env, start_new_session=True, **pipes)

    def run(self, output: object, *arguments: str, code: int = 0, python: str = sys.executable) -> tuple[str, str]:
        """Runs `prepare` to its end. Returns its log and its errors."""
        process = self.start(output, *arguments, python=python)
        log, errors = process.communicate(timeout=240)
        assert process.returncode == code, log + errors
        return log, errors

    def kill_when(self, process: subprocess.Popen[str], has_happened) -> None:
        """Kills the process alone, whose children are to notice."""
        deadline = time.monotonic() + 90
        while not has_happened():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(tmp_path)


def digest(files: dict[str, bytes]) -> str:
    """One hash of the bytes of a folder."""
    return hashlib.sha256(
        json.dumps([[n, hashlib.sha256(files[n]).hexdigest()] for n in sorted(files)]).encode()
    ).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> str:
    """The hash of the corpus by local `prepare`, in the environment that LOCAL_PYTHON names, else in this one."""
    desk = Desk(tmp_path_factory.mktemp("local"))
    desk.run(desk.folder / "corpus", python=os.environ.get("LOCAL_PYTHON", sys.executable))
    made = contents(desk.folder / "corpus")
    assert len([name for name in made if name.startswith("train-") and "crc32" not in name]) >= 16
    assert "train-00010-00001.npy" in made or any(name.count("-") == 2 for name in made)  # a unit of several parts
    # The text lies elsewhere in each test: its path is in corpus.json alone.
    return digest(without_path(made))


def without_path(made: dict[str, bytes]) -> dict[str, bytes]:
    """Leaves out what of corpus.json depends on the path of the text."""
    manifest = json.loads(made["corpus.json"])
    for key in ("request", "sha256"):
        del manifest[key]
    del manifest["source"]["name"]
    return {**made, "corpus.json": json.dumps(manifest).encode()}


NEAR = ("--config.data.dedup=near",)


def plant_duplicates(desk: Desk) -> None:
    documents = (desk.folder / "text" / "a.txt").read_text().split("\n\n")
    copies = [text if i % 2 else f"{text} again" for i, text in enumerate(documents[::10])]
    (desk.folder / "text" / "c.txt").write_text("\n\n".join(copies))
    desk.changes = NEAR


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory) -> str:
    """The hash of the corpus without duplicates, as `local`."""
    desk = Desk(tmp_path_factory.mktemp("cleaned"))
    plant_duplicates(desk)
    log, _ = desk.run(desk.folder / "corpus", python=os.environ.get("LOCAL_PYTHON", sys.executable))
    assert "dropped: 25 copies, 25 near-duplicates" in log
    return digest(without_path(contents(desk.folder / "corpus")))


def units_made(folder: Path) -> int:
    return len(list(folder.glob("*/units/?????.json")))


def test_16_shards_in_random_order_with_kills(desk, local):
    output, rng = desk.folder / "corpus", random.Random()
    order = rng.sample(range(1, 17), 16)
    killed = set(order[:4])
    waiting, running = list(order), []
    while waiting or running:
        while waiting and len(running) < 2:
            shard = waiting.pop(0)
            running.append((shard, desk.start(output, f"--shard={shard}/16")))
        shard, process = running.pop(0)
        if shard in killed:
            killed.remove(shard)
            time.sleep(rng.uniform(0, 2))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            waiting.append(shard)
        else:
            log, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
            assert f"shard {shard} of 16 is done" in log
    assert not output.exists()
    desk.run(output, "--shard=3/16")  # again: nothing is left to do
    desk.run(output, "--merge")
    assert digest(without_path(contents(output))) == local
    assert not (desk.folder / "corpus.tmp").exists()
    log, _ = desk.run(output, "--merge")
    assert "already prepared" in log


def test_merge_names_what_is_missing(desk):
    output = desk.folder / "corpus"
    desk.run(output, "--shard=2/3")
    _, errors = desk.run(output, "--merge", code=2)
    assert "units are not made (0, 2, 3, 5, 6, ...); run --shard=1/3, --shard=3/3 with the same settings" in errors
    assert units_made(desk.folder / "corpus.tmp")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_makes_the_same_bytes_after_a_kill(desk, local, engine):
    output, work = desk.folder / "corpus", desk.folder / "corpus.tmp"
    desk.kill_when(desk.start(output, *engine), lambda: units_made(work) > 1)
    assert not output.exists()
    log, _ = desk.run(output, *engine)
    assert "tokenizer: made before, used again" in log
    assert "units were finished before and are reused" in log
    assert digest(without_path(contents(output))) == local
    time.sleep(1)  # a worker that outlived its launcher would make it again
    assert not work.exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_wrong_in_a_worker_is_one_line(desk, engine):
    desk.run(desk.folder / "other")  # for its tokenizer: with a given one, the workers are the first to read all text
    lines = [json.dumps({"text": text}) for text in prose(0, 400).split("\n\n")]
    lines[350] = '{"text": nonsense'
    (desk.folder / "bad.jsonl").write_text("\n".join(lines))
    desk.source = f"jsonl:{desk.folder / 'bad.jsonl'}"
    desk.changes = (f"--config.tokenizer.path={desk.folder / 'other' / 'tokenizer.model'}",)
    _, errors = desk.run(desk.folder / "corpus", *engine, code=2)
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert f"{desk.folder / 'bad.jsonl'}:351 is not JSON" in line
    assert "Traceback" not in errors
    assert not (desk.folder / "corpus").exists()
    assert units_made(desk.folder / "corpus.tmp")


@pytest.mark.parametrize("engine", ENGINES)
def test_cleaning_by_an_engine_makes_the_same_bytes_after_a_kill(desk, cleaned, engine):
    plant_duplicates(desk)
    output, work = desk.folder / "corpus", desk.folder / "corpus.tmp"
    desk.kill_when(desk.start(output, *engine), lambda: len(list(work.glob("*/signatures/*"))) > 1)
    assert not list(work.glob("*/tokenizer"))
    log, _ = desk.run(output, *engine)
    assert "reading signatures: " in log
    assert digest(without_path(contents(output))) == cleaned
    assert not work.exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_wrong_in_the_pass_of_signatures_is_one_line(desk, engine):
    lines = [json.dumps({"text": text}) for text in prose(0, 400).split("\n\n")]
    lines[350] = '{"text": nonsense'
    (desk.folder / "bad.jsonl").write_text("\n".join(lines))
    desk.source, desk.changes = f"jsonl:{desk.folder / 'bad.jsonl'}", NEAR
    _, errors = desk.run(desk.folder / "corpus", *engine, code=2)
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert f"{desk.folder / 'bad.jsonl'}:351 is not JSON" in line
    assert "Traceback" not in errors
    assert list((desk.folder / "corpus.tmp").glob("*/signatures/*"))
    assert not list((desk.folder / "corpus.tmp").glob("*/tokenizer"))


BAD_FLAGS = [
    (("--shard=0/4",), "--shard is '0/4'; expected K/N with 1 <= K <= N"),
    (("--shard=",), "--shard is ''; expected K/N"),
    (("--shard=5/4",), "--shard is '5/4'; expected K/N"),
    (("--shard=1/4", "--merge"), "--shard, --merge, --engine and --tokenizer_only exclude each other"),
    (("--", "--num_cpus=2"), "unexpected argument '--num_cpus=2' after --"),
    (("--output=ftp://a/b",), "--output: 'ftp://a/b' has the scheme ftp://"),
    (("--output=s3://bucket",), "--output: 's3://bucket' is a whole bucket; name a folder in it"),
]
BAD_ARGUMENTS = {
    "beam": [
        ("--direct_num_worker=2", "Beam has no option --direct_num_worker"),
        ("--direct_num_workers=two", "invalid int value: 'two'"),
        ("--runner=DirectRuner", "Unexpected pipeline runner: DirectRuner"),
        ("--runner=DataflowRunner", "Missing required option: region"),
    ],
    "ray": [
        ("--num_cpu=2", "no argument 'num_cpu'; did you mean 'num_cpus'?"),
        ("num_cpus=2", "'num_cpus=2' is no argument of ray.init"),
    ],
}


@pytest.mark.parametrize(("arguments", "message"), BAD_FLAGS)
def test_flags_that_will_not_do(desk, arguments, message):
    _, errors = desk.run(desk.folder / "corpus", *arguments, code=2)
    assert errors.startswith("error: ")
    assert message in errors


@pytest.mark.parametrize("engine", ENGINES)
def test_arguments_that_an_engine_does_not_take(desk, engine):
    name, dashes, *_ = engine
    for argument, message in BAD_ARGUMENTS[name.removeprefix("--engine=")]:
        _, errors = desk.run(desk.folder / "corpus", name, dashes, argument, code=2)
        assert message in errors.splitlines()[-1]
        assert "Traceback" not in errors
        assert not (desk.folder / "corpus.tmp").exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_an_engine_that_is_missing(desk):
    _, errors = desk.run(desk.folder / "corpus", "--engine=ray", code=2)
    assert "--engine=ray needs the package ray, in an environment of its own" in errors


class Bucket:
    """A bucket of a stand-in: S3 or Cloud Storage."""

    def __init__(self, scheme: str, server):
        self.scheme, self.server = scheme, server

    def names(self) -> list[str]:
        return self.server.names("bucket") if self.scheme == "s3" else sorted(self.server.buckets["bucket"])

    def contents(self, folder: str) -> dict[str, bytes]:
        names = [name for name in self.names() if name.startswith(f"{folder}/")]
        read = self.server.content if self.scheme == "s3" else lambda b, name: self.server.buckets[b][name].content
        return {name.removeprefix(f"{folder}/"): read("bucket", name) for name in names}


@pytest.fixture(params=["s3", "gs"])
def bucket(request) -> Iterator[Bucket]:
    pytest.importorskip({"s3": "moto", "gs": "google_crc32c"}[request.param])
    pytest.importorskip({"s3": "s3fs", "gs": "gcsfs"}[request.param])
    from tests.helpers.fake_gcs import FakeGcs
    from tests.helpers.fake_s3 import FakeS3

    with (FakeS3 if request.param == "s3" else FakeGcs)("bucket") as server:
        yield Bucket(request.param, server)


@pytest.mark.parametrize("maker", MAKERS)
def test_output_in_a_bucket_after_a_kill(desk, local, bucket, maker):
    output = f"{bucket.scheme}://bucket/made/corpus"
    desk.env.update(bucket.server.env)

    def has_begun() -> bool:
        return len([name for name in bucket.names() if "/units/" in name and name.count("-") == 0]) > 1

    desk.kill_when(desk.start(output, *maker), has_begun)
    assert "corpus.json" not in bucket.contents("made/corpus")
    log, _ = desk.run(output, *maker)
    assert "units were finished before and are reused" in log
    assert digest(without_path(bucket.contents("made/corpus"))) == local
    time.sleep(1)
    assert not bucket.contents("made/corpus.tmp")
    log, _ = desk.run(output, *maker)
    assert "already prepared" in log


def test_shards_in_a_bucket(desk, local, bucket):
    output = f"{bucket.scheme}://bucket/corpus"
    desk.env.update(bucket.server.env)
    running = [desk.start(output, f"--shard={shard}/2") for shard in (1, 2)]
    for process in running:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    desk.changes = ("--config.data.seq_len=128",)
    _, errors = desk.run(output, code=2)
    assert "holds unfinished work of other text or settings" in errors
    desk.changes = ()
    desk.run(output, "--merge")
    assert digest(without_path(bucket.contents("corpus"))) == local
    assert not bucket.contents("corpus.tmp")
