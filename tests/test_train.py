"""Whole runs: they finish, learn, survive being killed, and go on elsewhere."""

import json
import queue
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from flax_mlm import checkpoint, sharding
from flax_mlm import config as config_lib
from flax_mlm.errors import UserError
from flax_mlm.step import make_steps

# Coroutines that orbax drops when a checkpoint cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEPS = 200
SHORT = {"train__steps": STEPS, "train__checkpoint_every": 10}
RATES = {"tokens_per_second", "data_wait", "eta_seconds", "mfu"}


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Everything that a checkpoint holds, as bytes-comparable arrays."""
    import jax

    found = {}
    for item in ("params", "rest"):
        with ocp.PyTreeCheckpointer() as checkpointer:
            folder = workdir / "checkpoints" / str(step) / item
            tree = checkpointer.metadata(folder).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            restored = checkpointer.restore(folder, restore_args=as_numpy)
        for path, value in jax.tree_util.tree_leaves_with_path(restored):
            found[item + jax.tree_util.keystr(path)] = np.asarray(value)
    assert len(found) > 20
    return found


def train_lines(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in RATES} for line in lines if line["kind"] == "train"]


def assert_same_run(workdir: Path, other: Path, step: int = STEPS) -> None:
    """Bit for bit: parameters, optimizer state, the metrics of every step, and the result."""
    mine, theirs = arrays(workdir, step), arrays(other, step)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name, strict=True)
    assert train_lines(workdir) == train_lines(other)
    assert (workdir / "result.json").read_text() == (other / "result.json").read_text()


class Watched:
    """A running `train` whose lines can be waited for."""

    def __init__(self, toy, workdir: Path, *flags: str):
        self.workdir, self.lines = workdir, []
        self.process = toy.start("train", f"--workdir={workdir}", *flags)
        self._queue: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._queue.put(line)
        self._queue.put(None)

    def until_line(self, start: str) -> None:
        while (line := self._queue.get(timeout=120)) is not None:
            self.lines.append(line)
            if line.startswith(start):
                return
        raise AssertionError(f"no line '{start}': {self.lines} {self.process.stderr.read()}")

    def until_folder(self, pattern: str) -> None:
        while not list((self.workdir / "checkpoints").glob(pattern)):
            assert self.process.poll() is None, f"ended before '{pattern}': {self.process.stderr.read()}"
            time.sleep(0.0005)

    def kill(self) -> None:
        assert self.process.poll() is None, "it ended before it was killed"
        self.process.kill()
        self.process.wait()

    def finish(self) -> tuple[int, str, str]:
        err = self.process.stderr.read()
        while (line := self._queue.get(timeout=120)) is not None:
            self.lines.append(line)
        return self.process.wait(), "".join(self.lines), err


@pytest.fixture(scope="module")
def undisturbed(toy) -> Path:
    workdir = toy.folder / "undisturbed"
    done = toy.run("train", f"--workdir={workdir}", *toy.flags(**SHORT))
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_run_leaves_what_it_says_and_has_learned(toy, trained_run):
    log = (toy.folder / "trained.log").read_text()
    assert "Traceback" not in log and "step 300/300  loss" in log
    assert {p.name for p in trained_run.iterdir()} == {"checkpoints", "config.json", "metrics.jsonl", "result.json"}
    assert checkpoint.steps_in(trained_run) == [200, 300]
    result = json.loads((trained_run / "result.json").read_text())
    assert result["loss"] < 0.5 * result["unigram_entropy"]
    assert result["accuracy"] > 3 * result["majority_accuracy"]
    lines = train_lines(trained_run)
    assert [line["step"] for line in lines] == list(range(1, 301))
    assert lines[-1]["learning_rate"] < lines[60]["learning_rate"] and lines[-1]["skipped"] == 0
    config_lib.build(config_lib.from_dict(json.loads((trained_run / "config.json").read_text())))


def test_a_finished_run_says_so_and_stays_as_it_is(toy, trained_run):
    before = {p: p.read_bytes() for p in trained_run.rglob("*") if p.is_file()}
    done = toy.run("train", f"--workdir={trained_run}", *toy.flags())
    assert done.returncode == 0, done.stderr
    assert "this run is finished: 300 steps are done" in done.stdout
    assert before == {p: p.read_bytes() for p in trained_run.rglob("*") if p.is_file()}


def test_killed_five_times_it_ends_with_the_same_bits(toy, undisturbed, tmp_path):
    workdir, flags = tmp_path / "run", toy.flags(**SHORT)
    for moment in ("step 3/", "50", "step 94/", "130*tmp*", "step 186/"):
        run = Watched(toy, workdir, *flags)
        run.until_line(moment) if moment.startswith("step") else run.until_folder(moment)
        run.kill()
    code, out, err = Watched(toy, workdir, *flags).finish()
    assert code == 0, err
    assert "restored step 1" in out
    assert_same_run(workdir, undisturbed)
    names = {p.name for p in (workdir / "checkpoints").iterdir()}
    assert {"190", "200"} <= names and not [n for n in names if "tmp" in n]


def test_sigterm_saves_the_step_and_leaves_with_75(toy, undisturbed, tmp_path):
    workdir, flags = tmp_path / "run", toy.flags(**SHORT)
    run = Watched(toy, workdir, *flags)
    run.until_line("step 103/")
    run.process.send_signal(signal.SIGTERM)
    code, out, err = run.finish()
    assert code == 75, err
    (step,) = checkpoint.steps_in(workdir)[-1:]
    assert f"stopped by a signal; step {step} is saved" in out and step >= 103
    assert err == "SIGTERM: saving after this step, then leaving\n"
    code, out, err = Watched(toy, workdir, *flags).finish()
    assert code == 0 and f"restored step {step}" in out
    assert_same_run(workdir, undisturbed)


def truncate(folder: Path) -> None:
    largest = max((p for p in (folder / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


DAMAGE = {
    "truncated": truncate,
    "no params": lambda folder: shutil.rmtree(folder / "params"),
    "no optimizer state": lambda folder: shutil.rmtree(folder / "rest"),
    "no arrays": lambda folder: shutil.rmtree(folder / "params" / "d"),
    "no meta": lambda folder: shutil.rmtree(folder / "meta"),
    "empty meta": lambda folder: (folder / "meta" / "metadata").write_text(""),
}


@pytest.fixture
def reopened(toy, undisturbed, tmp_path):
    """A copy of the run, and a function that restores it in this process and returns (step, what was logged)."""
    workdir = shutil.copytree(undisturbed, tmp_path / "copy")
    config = config_lib.build(config_lib.from_dict(json.loads((workdir / "config.json").read_text())))
    mesh = sharding.make_mesh(config.mesh)
    steps = make_steps(config, config.tokenizer.vocab_size, mesh)
    meta = checkpoint.read_meta(workdir / "checkpoints" / str(STEPS))

    def restore() -> tuple[int, list[str]]:
        log: list[str] = []
        checkpoints = checkpoint.Checkpoints(workdir, config, meta)
        try:
            return int(checkpoints.restore_latest(steps.abstract, log.append).step), log
        finally:
            checkpoints.close()

    return workdir, restore


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(reopened, damage):
    workdir, restore = reopened
    DAMAGE[damage](workdir / "checkpoints" / str(STEPS))
    step, log = restore()
    assert step == STEPS - 10
    assert not (workdir / "checkpoints" / str(STEPS)).exists()  # it would be in the way of saving that step again
    assert damage == "no meta" or any(line.startswith(f"checkpoint {STEPS} skipped") for line in log), log


def test_a_folder_that_only_looks_like_a_checkpoint_is_passed_over(reopened):
    workdir, restore = reopened
    (workdir / "checkpoints" / "999").mkdir()
    assert restore()[0] == STEPS


def test_no_readable_checkpoint_is_an_error_not_a_fresh_start(reopened):
    workdir, restore = reopened
    for step in checkpoint.steps_in(workdir):
        truncate(workdir / "checkpoints" / str(step))
    with pytest.raises(UserError, match="none of the checkpoints"):
        restore()


def test_after_a_damaged_checkpoint_the_run_ends_the_same(toy, undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "copy")
    (workdir / "result.json").unlink()
    truncate(workdir / "checkpoints" / str(STEPS))
    done = toy.run("train", f"--workdir={workdir}", *toy.flags(**SHORT))
    assert done.returncode == 0, done.stderr
    assert f"checkpoint {STEPS} skipped, it cannot be read" in done.stdout and "restored step 190" in done.stdout
    assert_same_run(workdir, undisturbed)


@pytest.mark.parametrize("changes, devices", [({"mesh__data": 4, "mesh__fsdp": 2}, 8), ({"train__microbatches": 2}, 1)])
def test_it_goes_on_with_another_layout(toy, undisturbed, tmp_path, changes, devices):
    workdir = shutil.copytree(undisturbed, tmp_path / "copy")
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    done = toy.run("train", f"--workdir={workdir}", *toy.flags(**SHORT, **changes), devices=devices)
    assert done.returncode == 0, done.stderr
    assert "restored step 190" in done.stdout
    for name, value in arrays(workdir, STEPS).items():
        np.testing.assert_allclose(value, arrays_of_undisturbed(undisturbed)[name], rtol=0, atol=1e-5, err_msg=name)
    for mine, theirs in zip(train_lines(workdir), train_lines(undisturbed), strict=True):
        assert mine.pop("kind") == theirs.pop("kind")
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        assert mine["predicted_tokens"] == theirs["predicted_tokens"] and mine["tokens"] == theirs["tokens"]


_cached: dict[Path, dict[str, np.ndarray]] = {}


def arrays_of_undisturbed(workdir: Path) -> dict[str, np.ndarray]:
    if workdir not in _cached:
        _cached[workdir] = arrays(workdir, STEPS)
    return _cached[workdir]


def test_non_finite_losses_stop_the_run_with_a_finite_checkpoint(toy, tmp_path):
    changes = {"optimizer__learning_rate": 1e30, "optimizer__max_nonfinite_steps": 3, "optimizer__name": "adamw"}
    done = toy.run("train", f"--workdir={tmp_path / 'run'}", *toy.flags(**changes))
    assert done.returncode == 1, done
    assert done.stderr.startswith("stopped: ") and "steps in a row had a non-finite loss" in done.stderr
    assert "lower optimizer.learning_rate" in done.stderr and done.stderr.count("\n") == 1
    (step,) = checkpoint.steps_in(tmp_path / "run")
    assert f"step {step} is saved" in done.stderr
    found = arrays(tmp_path / "run", step)
    assert all(np.isfinite(value).all() for value in found.values())
    assert train_lines(tmp_path / "run")[-1]["skipped"] >= 3
