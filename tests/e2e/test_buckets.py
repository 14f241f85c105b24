"""Runs whose workdir, checkpoints and corpus lie in a bucket, with fake_gcs.py for Cloud Storage."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from flax_mlm.checkpoint import store
from flax_mlm.checkpoint.format import find_checkpoints
from flax_mlm.checkpoint.store import saved_steps
from flax_mlm.config.load import build
from flax_mlm.configs import base
from flax_mlm.data.mixture import Mixture
from flax_mlm.errors import Failure, UserError
from flax_mlm.storage import gcs as gcs_lib
from flax_mlm.storage import lease
from flax_mlm.training import metrics, run_config
from tests.helpers.checkpoints import opened, restored, save_three, state_at
from tests.helpers.fake_gcs import FakeGcs
from tests.helpers.paths import ROOT
from tests.helpers.runs import Watched, assert_same_run, finish, metrics_of

# Coroutines that orbax drops when a checkpoint cannot be read or written.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEPS = 30
SHORT = {"train__steps": STEPS, "train__checkpoint_every": 10, "train__eval_every": 20, "train__max_to_keep": 2}
SHORT |= {"model__glu": True, "model__type_vocab_size": 0}  # for which transformers has a class


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


def put(gcs: FakeGcs, folder: Path, prefix: str) -> None:
    """Copies a folder to the bucket."""
    for file in folder.rglob("*"):
        if file.is_file():
            gcs.put("bucket", f"{prefix}/{file.relative_to(folder)}", file.read_bytes())


def damage(gcs: FakeGcs, prefix: str) -> None:
    """Changes a byte in the middle of each object."""
    for name in gcs.names("bucket", prefix):
        content = bytearray(gcs.buckets["bucket"][name].content)
        content[len(content) // 2] ^= 0xFF
        gcs.put("bucket", name, bytes(content))


def test_a_run_in_a_bucket_is_that_in_a_folder(toy, straight, gcs, tmp_path):
    out = finish(toy, "gs://bucket/runs/first", *toy.flags(**SHORT, log__tensorboard=True))
    assert_same_run(local(gcs, "runs/first", tmp_path), straight, STEPS)
    assert saved_steps("gs://bucket/runs/first") == [20, 30], "the last two are kept"
    names = {name.split("/")[2] for name in gcs.names("bucket", "runs/first/")}
    assert names == {"checkpoints", "config.json", "metrics.jsonl", "result.json", "tensorboard"}
    assert "written to gs://bucket/runs/first:" in out
    before = dict(gcs.buckets["bucket"])
    out = finish(toy, "gs://bucket/runs/first", *toy.flags(**SHORT))
    assert "this run is finished: 30 steps are done" in out
    assert gcs.buckets["bucket"] == before, "a finished run stays as it is"


def test_it_is_killed_and_goes_on(toy, straight, gcs, tmp_path):
    workdir = "gs://bucket/runs/killed"
    for line in ("step 13/", "step 20/30  validation"):
        run = Watched(toy, workdir, *toy.flags(**SHORT))
        run.until_line(line)
        run.kill()
    out = finish(toy, workdir, *toy.flags(**SHORT))
    assert "taking over" in out
    assert "restored step" in out
    assert_same_run(local(gcs, "runs/killed", tmp_path), straight, STEPS)


def test_sigterm_saves(toy, straight, gcs, tmp_path):
    workdir = "gs://bucket/runs/preempted"
    run = Watched(toy, workdir, *toy.flags(**SHORT))
    run.until_line("step 13/")
    run.process.terminate()
    (code,), out = run.finish()
    assert code == 75, run.err
    (step,) = {s for s in saved_steps(workdir) if s % 10} or {20}
    assert f"step {step} is saved" in out
    assert "runs/preempted/lease.json" not in gcs.buckets["bucket"]
    assert f"restored step {step}" in finish(toy, workdir, *toy.flags(**SHORT))
    assert_same_run(local(gcs, "runs/preempted", tmp_path), straight, STEPS)


def test_a_second_job_is_refused(toy, gcs):
    workdir = "gs://bucket/runs/taken"
    run = Watched(toy, workdir, *toy.flags(**{**SHORT, "train__steps": 100_000}))
    run.until_line("step 1/")
    done = toy.run("train", f"--workdir={workdir}", *toy.flags(**SHORT))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"'{workdir}' is in use by process {run.process.pid} on " in done.stderr
    run.kill()


def test_damage_is_passed_over_and_put_aside(toy, straight, gcs, tmp_path):
    put(gcs, straight, "runs/damaged")
    damage(gcs, "runs/damaged/checkpoints/30/rest/d/")
    gcs.remove("bucket", "runs/damaged/result.json")
    out = finish(toy, "gs://bucket/runs/damaged", *toy.flags(**SHORT))
    assert "checkpoint 30 skipped, and moved to gs://bucket/runs/damaged/checkpoints/.quarantine/30-" in out
    assert "restored step 20" in out
    aside = gcs.names("bucket", "runs/damaged/checkpoints/.quarantine/")
    assert len(aside) == len([f for f in (straight / "checkpoints" / "30").rglob("*") if f.is_file()])
    assert_same_run(local(gcs, "runs/damaged", tmp_path), straight, STEPS)


def test_two_processes(toy, straight, gcs, tmp_path):
    put(gcs, toy.corpus, "corpus")
    flags = toy.flags(**SHORT, data__corpus="gs://bucket/corpus")
    out = finish(toy, "gs://bucket/runs/two", *flags, processes=2)
    assert "corpus      gs://bucket/corpus" in out
    folder = local(gcs, "runs/two", tmp_path)
    fingerprints = [[line["batch_fingerprint"] for line in metrics_of(run)] for run in (folder, straight)]
    assert fingerprints[0] == fingerprints[1]
    assert len(fingerprints[0]) == STEPS
    assert saved_steps("gs://bucket/runs/two") == [20, 30]


def test_other_commands(toy, straight, gcs, tmp_path):
    put(gcs, straight, "runs/done")
    where = "--checkpoint=gs://bucket/runs/done"
    outputs = []
    for checkpoint_flag in (where, f"--checkpoint={straight}"):
        asked = toy.run("fill_mask", checkpoint_flag, "The dog [MASK] in the garden today.")
        evaluated = toy.run("evaluate", checkpoint_flag, f"--config.data.corpus={toy.corpus}", "--mask_rates=")
        assert asked.returncode == evaluated.returncode == 0, asked.stderr + evaluated.stderr
        outputs.append((asked.stdout, evaluated.stdout))
    assert outputs[0] == outputs[1]
    done = toy.run("evaluate", f"{where}@20", f"--config.data.corpus={toy.corpus}", "--mask_rates=")
    assert done.returncode == 0, done.stderr
    for name, checkpoint_flag in (("there", where), ("here", f"--checkpoint={straight}")):
        done = toy.run("export", checkpoint_flag, f"--output={tmp_path / name}")
        assert done.returncode == 0, done.stderr
    for file in (tmp_path / "here").iterdir():
        there = (tmp_path / "there" / file.name).read_bytes()
        assert file.read_bytes() == there.replace(b"there", b"here") or file.name == "README.md", file.name
    (tmp_path / "c.tsv").write_text("The dog [MASK] in the garden.\tbarks\n")
    done = toy.run(
        "compare",
        "--checkpoints=a=gs://bucket/runs/done",
        f"--tasks=cloze --data={tmp_path}/c.tsv",
        f"--output={tmp_path / 'c'}",
    )
    assert done.returncode == 0, done.stderr
    assert "a" in (tmp_path / "c" / "table.md").read_text(), done.stderr


WRONG = {
    "no bucket": ("gs://no-such-bucket/run", None, 2, "--workdir: there is no bucket 'no-such-bucket'"),
    "forbidden": ("gs://bucket/secret", 403, 2, "'gs://bucket/secret' cannot be used: these credentials do not allow"),
    "unknown": ("gs://bucket/secret", 401, 2, "'gs://bucket/secret' cannot be used: there are no valid credentials"),
    "another scheme": ("s3://bucket/run", None, 2, "expected a folder or gs://BUCKET/FOLDER"),
    "no name": ("gs://", None, 2, "expected gs://BUCKET/FOLDER"),
    "dots": ("gs://bucket/runs/../x", None, 2, "expected gs://BUCKET/FOLDER"),
    "pattern": ("gs://bucket/runs[1]", None, 2, "contains '['"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("command", ["train", "fill_mask"])
def test_mistakes_are_one_line(toy, gcs, case, command):
    path, status, code, said = WRONG[case]
    gcs.fault = lambda *_: status
    if command == "train":
        done = toy.run("train", f"--workdir={path}", *toy.flags(**SHORT))
    else:
        done = toy.run("fill_mask", f"--checkpoint={path}", "[MASK]")
        said = said.replace("--workdir", "--checkpoint")
    assert done.returncode == code, done.stderr
    assert said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout, done.stderr


def test_without_gcsfs_it_is_named(toy, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'gcsfs' else f(n, *a)"
    )
    line = [sys.executable, "-m", "flax_mlm.train", "--workdir=gs://bucket/run", *toy.flags(**SHORT)]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "needs gcsfs; pip install -r launch/gcs-requirements.txt" in done.stderr


@pytest.mark.parametrize(
    "command, flag",
    [("export", "--output"), ("evaluate", "--json"), ("evaluate --task=retrieval", "--save")],
)
def test_what_is_written_to_folders_alone(toy, straight, command, flag):
    done = toy.run(*command.split(), f"--checkpoint={straight}", f"{flag}=gs://bucket/out")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"{flag}: 'gs://bucket/out' cannot be written; name a local file or folder" in done.stderr


def test_a_bucket_that_fails_now_and_then(toy, straight, gcs, tmp_path):
    asked = itertools.count(1)
    gcs.fault = lambda *_: 503 if next(asked) % 40 == 0 else None
    finish(toy, "gs://bucket/runs/flaky", *toy.flags(**SHORT))
    assert next(asked) > 200
    assert_same_run(local(gcs, "runs/flaky", tmp_path), straight, STEPS)


@pytest.fixture
def saved(gcs, request):
    """A workdir with steps 10, 20 and 30 of a state that is quickly saved."""
    workdir = epath.Path("gs://bucket/saved/" + re.sub(r"\W", "-", request.node.name))
    return save_three(workdir)


def test_an_outage_is_no_damage(gcs, saved, monkeypatch):
    """A checkpoint that cannot be read for the moment is neither skipped nor put away, and nothing begins anew."""
    monkeypatch.setattr(store, "_RETRIES", {"max_retries": 1, "initial_delay": "10ms", "max_delay": "10ms"})
    for part in ("/params/d/", "/rest/d/"):
        gcs.fault = lambda method, bucket, name, part=part: 503 if part in name and method == "GET" else None
        with pytest.raises(Failure, match="cannot be reached"):
            restored(saved)
    for name in ("/meta/metadata", ""):
        gcs.fault = lambda method, bucket, path, name=name: 403 if path.endswith(name) and method == "GET" else None
        with pytest.raises(UserError, match="do not allow"), gcs_lib.errors(saved):
            restored(saved)
    gcs.fault = None
    assert restored(saved)[0] == 30
    assert saved_steps(saved) == [10, 20, 30]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_step_is_never_half_there(gcs, saved, damaged):
    """Whenever a deletion or the putting aside of a step ends, what still has its marker is whole."""
    prefix = f"{str(saved).removeprefix('gs://bucket/')}/checkpoints/"
    whole = len(gcs.names("bucket", f"{prefix}30/"))
    before = {name: gcs.buckets["bucket"][name].content for name in gcs.names("bucket", prefix)}
    checkpoint_store = store.Store(saved / "checkpoints")
    for ends_after in range(2 * whole + 4):
        for name, content in before.items():
            gcs.put("bucket", name, content)
        done = itertools.count()
        gcs.fault = lambda m, *_, n=ends_after, done=done: 403 if m != "GET" and next(done) >= n else None
        with contextlib.suppress(OSError):
            checkpoint_store.quarantine("30") if damaged else checkpoint_store.delete("30")
        gcs.fault = None
        for folder in {name.rpartition("/")[0] for name in gcs.names("bucket", prefix) if MARKED.search(name)}:
            assert len(gcs.names("bucket", folder + "/")) == whole, folder
        kept = gcs.names("bucket", prefix + ".quarantine/")
        assert not damaged or len(gcs.names("bucket", prefix + "30/")) == whole or len(kept) == whole
        opened(saved).close()  # sweeps
        assert len(gcs.names("bucket", f"{prefix}30/")) in (0, whole)
        gcs.remove("bucket", prefix + ".quarantine/")
    assert not gcs.names("bucket", f"{prefix}30/"), "with no faults left it was carried out"


def test_a_sound_step_is_taken_back_from_quarantine(gcs, saved):
    prefix = f"{str(saved).removeprefix('gs://bucket/')}/checkpoints/"
    before = gcs.names("bucket", prefix)
    store.Store(saved / "checkpoints").quarantine("30")
    assert saved_steps(saved) == [10, 20]
    step, log = restored(saved)
    assert step == 30
    assert "checkpoint 30 is sound after all, and taken back from gs://bucket/" in log[0]
    assert gcs.names("bucket", prefix) == before


def test_what_another_program_wrote_is_not_touched(gcs, saved):
    prefix = str(saved).removeprefix("gs://bucket/")
    gcs.put("bucket", f"{prefix}/checkpoints/40/model.pt", b"x")
    before = gcs.names("bucket", f"{prefix}/")
    with pytest.raises(UserError, match="holds 'checkpoints/40', which no run of flax_mlm has written"):
        run_config.refuse_foreign(saved)
    opened(saved).close()
    assert gcs.names("bucket", f"{prefix}/") == before


def test_a_folder_of_the_name_goes_before_a_step(gcs, saved):
    assert [path.name for path in find_checkpoints(f"{saved}@20")] == ["20"]
    save_three(epath.Path(f"{saved}@20"))
    assert [path.name for path in find_checkpoints(f"{saved}@20")] == ["30", "20", "10"]
    assert [path.name for path in find_checkpoints(f"{saved}@20@10")] == ["10"]


MARKED = re.compile(r"/30/commit_success[.]txt$")


def test_a_save_that_fails_is_tried_again(gcs, saved, capsys, monkeypatch):
    monkeypatch.setattr(store, "_RETRIES", {"max_retries": 1, "initial_delay": "10ms", "max_delay": "10ms"})
    checkpoints = opened(saved, max_to_keep=2)
    gcs.fault = lambda method, bucket, name: 503 if "/40/params/ocdbt" in name and method == "POST" else None
    assert not (checkpoints.save(40, state_at(40)) and checkpoints.wait())
    assert "WARNING: step 40 could not be saved" in (out := capsys.readouterr().out)
    assert "step 30 is the last" in out
    gcs.fault = None

    def cannot_see_the_lease() -> None:
        raise gcs_lib.Unreachable("it does not answer")

    assert not checkpoints.save(45, state_at(45), cannot_see_the_lease)
    assert "WARNING: step 45 could not be saved (Unreachable: it does not answer)" in capsys.readouterr().out
    assert checkpoints.save(50, state_at(50))
    assert checkpoints.wait()
    checkpoints.close()
    assert saved_steps(saved) == [30, 50]
    assert restored(saved)[0] == 50
    assert {path.name for path in (saved / "checkpoints").iterdir()} == {"30", "50"}


def take(workdir: epath.Path, name: str, said: dict[str, str]) -> lease.Lease | None:
    held = lease.Lease(workdir, name)
    try:
        held.take(lambda _: None, stale=0.5)
    except UserError as e:
        said[name] = str(e)
        return None
    return held


@pytest.mark.parametrize("left", [None, b'{"run_id": "dead", "host": "elsewhere"}', b"{"])
def test_of_eight_jobs_one_takes_the_lease(gcs, left):
    workdir, said = epath.Path(f"gs://bucket/lease/{bool(left)}{len(left or b'')}"), dict[str, str]()
    if left:
        gcs.put("bucket", f"{str(workdir).removeprefix('gs://bucket/')}/lease.json", left)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        held = [one for one in pool.map(lambda i: take(workdir, f"job{i}", said), range(8)) if one]
    assert len(held) == 1
    assert len(said) == 7
    assert all("is in use by" in line for line in said.values()), said
    held[0].check()
    held[0].release()
    assert lease.holder(workdir) == ""


def test_a_lost_lease_is_noticed(gcs):
    workdir = epath.Path("gs://bucket/lost")
    held = take(workdir, "mine", {})
    gcs.put("bucket", "lost/lease.json", b'{"run_id": "theirs", "pid": 1, "host": "elsewhere", "since": "now"}')
    with pytest.raises(UserError, match="now belongs to process 1 on elsewhere since now; this job must not write"):
        held.check()
    held.release()
    assert lease.holder(workdir) == "theirs", "it is not ours to remove"
    gcs.remove("bucket", "lost/")
    with pytest.raises(UserError, match=r"has lost its lease.json"):
        held.check()


def test_a_write_that_was_done_although_its_answer_was_lost(gcs):
    path, seen = epath.Path("gs://bucket/once"), itertools.count()
    answer = gcs.answer

    def lossy(method, *rest):
        answered = answer(method, *rest)
        return answered._replace(status=503) if method == "POST" and next(seen) == 0 else answered

    gcs.answer = lossy
    try:
        assert gcs_lib.write(path, b"mine", 0)
    finally:
        gcs.answer = answer
    assert next(seen) > 1
    assert not gcs_lib.write(path, b"theirs", 0)


def test_metrics_that_cannot_be_copied_are_a_warning(gcs, capsys):
    config = build(base.get_config())
    writers = metrics.Writers(epath.Path("gs://bucket/metrics"), config, 0)
    gcs.fault = lambda method, bucket, name: 403 if method == "POST" else None
    writers.write(1, "train", {"loss": 1.0})
    writers.flush()
    assert "WARNING: metrics.jsonl could not be copied to gs://bucket/metrics" in capsys.readouterr().out
    gcs.fault = None
    writers.write(2, "train", {"loss": 2.0})
    writers.flush()
    assert gcs.buckets["bucket"]["metrics/metrics.jsonl"].content.count(b"\n") == 2
    writers.close()
    again = metrics.Writers(epath.Path("gs://bucket/metrics"), config, 1)
    again.write(2, "train", {"loss": 3.0})
    again.close()
    lines = gcs.buckets["bucket"]["metrics/metrics.jsonl"].content.decode().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 3.0]


def test_a_pattern_finds_the_corpora_of_a_bucket(gcs, toy):
    for name in ("sw", "en"):
        put(gcs, toy.corpus, f"languages/{name}")
    gcs.put("bucket", "languages/notes/readme.txt", b"")
    data = build(base.get_config()).data
    opened = Mixture.open(dataclasses.replace(data, corpus="gs://bucket/languages/*", sampling_alpha=0.3))
    assert [str(corpus.path) for corpus in opened.corpora.values()] == [
        "gs://bucket/languages/en",
        "gs://bucket/languages/sw",
    ]
    for text, said in (("gs://bucket/none/*", "matches no corpus"), ("gs://nowhere/*", "there is no bucket 'nowhere'")):
        with pytest.raises(UserError, match=said):
            Mixture.open(dataclasses.replace(data, corpus=text))
