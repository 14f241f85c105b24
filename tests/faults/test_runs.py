"""Whole runs that are killed, stopped, starved and spiked: they end with the same bits, or say why not."""

import json
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from flax_mlm.checkpoint.store import saved_steps
from flax_mlm.config.load import build, from_dict
from flax_mlm.errors import UserError
from flax_mlm.training import run_config
from tests.helpers.runs import Watched, arrays, assert_same_run, finish, metrics_of

STEPS = 100
SHORT = {
    "train__steps": STEPS, "train__checkpoint_every": 10, "train__eval_every": 40, "eval__batch_size": 8,
}  # fmt: skip
FULL = pytest.mark.full


@pytest.fixture(scope="module")
def undisturbed(toy) -> Path:
    workdir = toy.folder / "undisturbed"
    finish(toy, workdir, *toy.flags(**SHORT))
    return workdir


# Killed


@pytest.mark.fault(4)
@FULL
def test_killed_five_times_it_ends_with_the_same_bits(toy, undisturbed, tmp_path, outcome):
    workdir, flags = tmp_path / "run", toy.flags(**SHORT)
    for moment in ("step 3/", "checkpoints/30", "step 40/", "checkpoints/70/*tmp*", "step 87/"):
        run = Watched(toy, workdir, *flags)
        run.until_line(moment) if moment.startswith("step") else run.until_path(moment)
        run.kill()
    out = finish(toy, workdir, *flags)
    assert re.search(r"restored step [6789]0", out)
    assert "taking over" in out  # saving goes on beside the steps
    assert_same_run(workdir, undisturbed, STEPS)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == [".trash", "100", "90"]
    outcome("recovered", 5, kills=5)


@pytest.mark.fault(3)
@FULL
@pytest.mark.parametrize("moment", [f"checkpoints/{STEPS}/commit_success.txt", "result.json"])
def test_killed_between_the_last_commit_and_the_end(toy, undisturbed, tmp_path, outcome, moment):
    workdir, flags = tmp_path / "run", toy.flags(**SHORT)
    run = Watched(toy, workdir, *flags)
    run.until_path(moment)
    run.kill()
    assert (workdir / "lease.json").exists()
    out = finish(toy, workdir, *flags)
    assert "taking over" in out
    assert f"restored step {STEPS}" in out
    assert_same_run(workdir, undisturbed, STEPS)
    outcome("recovered", kills=1)


# Told to stop


@pytest.mark.fault(5)
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=FULL)])
def test_sigterm_saves_the_step_and_leaves_with_75(toy, undisturbed, tmp_path, outcome, number):
    workdir, flags = tmp_path / "run", toy.flags(**SHORT)
    run = Watched(toy, workdir, *flags)
    run.until_line("step 53/")
    run.process.send_signal(number)
    codes, out = run.finish()
    assert codes == [75], run.err
    (step,) = saved_steps(workdir)[-1:]
    assert f"stopped by a signal; step {step} is saved" in out
    assert step >= 53
    assert run.err == [f"{number.name}: saving, then leaving; a second one leaves at once\n"]
    assert not (workdir / "lease.json").exists()
    assert f"restored step {step}" in finish(toy, workdir, *flags)
    assert_same_run(workdir, undisturbed, STEPS)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["train_seconds"] for line in lines if line["kind"] == "train"]
    assert seconds == sorted(seconds), "the clock goes on where it was saved"
    outcome("recovered")


@pytest.mark.fault(7)
@FULL
def test_sigterm_during_an_evaluation(toy, undisturbed, tmp_path, outcome):
    workdir, flags = tmp_path / "run", toy.flags(**SHORT)
    run = Watched(toy, workdir, *flags)
    run.until_line("step 80/")  # the line of its training; its evaluation comes next
    run.process.send_signal(signal.SIGTERM)
    codes, out = run.finish()
    assert codes == [75], run.err
    assert "stopped by a signal; step 80 is saved" in out
    assert [line["step"] for line in metrics_of(workdir, "validation")] == [40]
    finish(toy, workdir, *flags)
    assert_same_run(workdir, undisturbed, STEPS)
    outcome("recovered")


@pytest.mark.fault(8)
@pytest.mark.parametrize("moment", ["lease.json", pytest.param("checkpoints", marks=FULL)])
def test_sigterm_before_the_first_step(toy, tmp_path, outcome, monkeypatch, moment):
    """While the step is compiled, which nothing can interrupt; no cache makes it short."""
    monkeypatch.setattr(toy, "folder", tmp_path)
    workdir = tmp_path / "run"
    run = Watched(toy, workdir, *toy.flags(**SHORT))
    run.until_path(moment)
    run.process.send_signal(signal.SIGTERM)
    codes, out = run.finish()
    assert codes == [75], run.err
    assert run.err[0].splitlines()[-1] == "stopped: SIGTERM: there is nothing to save"
    assert "step 1/" not in out
    assert saved_steps(workdir) == []
    assert not (workdir / "lease.json").exists()
    outcome("recovered")


@pytest.mark.fault(9)
@FULL
def test_a_second_sigterm_leaves_at_once(toy, undisturbed, tmp_path, outcome):
    workdir, flags = tmp_path / "run", toy.flags(**SHORT)
    run = Watched(toy, workdir, *flags)
    run.until_line("step 57/")
    run.process.send_signal(signal.SIGSTOP)  # so that both are there before it does anything
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        run.process.send_signal(number)
    codes, _ = run.finish()
    assert codes[0] in (128 + signal.SIGINT, 128 + signal.SIGTERM), run.err
    assert saved_steps(workdir)[-1] in (40, 50)
    finish(toy, workdir, *flags)
    assert_same_run(workdir, undisturbed, STEPS)
    outcome("recovered")


@pytest.mark.fault(12)
def test_a_computer_that_sleeps(toy, undisturbed, tmp_path, outcome):
    """Stopped for longer than it may be without progress, or without a word to JAX's own service: it goes on."""
    workdir, flags = tmp_path / "run", toy.flags(**SHORT, train__stall_timeout=8.0)
    run = Watched(toy, workdir, *flags, "--heartbeat=2")
    run.until_line("step 20/")
    run.process.send_signal(signal.SIGSTOP)
    time.sleep(12)
    run.process.send_signal(signal.SIGCONT)
    codes, _ = run.finish()
    assert codes == [0], run.err
    assert_same_run(workdir, undisturbed, STEPS)
    outcome("recovered")


# Several processes

TOGETHER = {**SHORT, "train__steps": 60, "train__eval_every": 20, "train__reproducible": True}


@pytest.fixture(scope="module")
def together(toy) -> Path:
    """On one process of one device; reproducible, so that any number of both must come to the same."""
    workdir = toy.folder / "together"
    finish(toy, workdir, *toy.flags(**TOGETHER))
    return workdir


@pytest.mark.fault(6)
@FULL
@pytest.mark.parametrize("which", [0, 1])
def test_sigterm_to_one_of_two(toy, together, tmp_path, outcome, which):
    workdir, flags = tmp_path / "run", toy.flags(**TOGETHER)
    run = Watched(toy, workdir, *flags, processes=2, devices=2)
    run.until_line("step 23/")
    run.processes[which].send_signal(signal.SIGTERM)
    codes, out = run.finish()
    assert codes == [75, 75], run.err
    (step,) = saved_steps(workdir)[-1:]
    assert f"stopped by a signal; step {step} is saved" in out
    assert step >= 23
    finish(toy, workdir, *flags, processes=2, devices=2)
    assert_same_run(workdir, together, 60)
    outcome("recovered")


@pytest.mark.parametrize(
    ("which", "moment", "survivor"),
    [
        pytest.param(1, "step 23/", 0, marks=pytest.mark.fault(10)),
        pytest.param(0, "step 23/", 1, marks=pytest.mark.fault(11)),
        pytest.param(1, "checkpoints/30", 0, marks=pytest.mark.fault(14)),
        pytest.param(0, "checkpoints/30", 1, marks=pytest.mark.fault(14)),
    ],
)
@FULL
def test_sigkill_of_one_of_two(toy, together, tmp_path, outcome, which, moment, survivor):
    workdir, flags = tmp_path / "run", toy.flags(**TOGETHER)
    run = Watched(toy, workdir, *flags, processes=2, devices=2)
    run.until_line(moment) if moment.startswith("step") else run.until_path(moment)
    run.kill(which)
    codes, _ = run.finish()
    assert codes[which] == -signal.SIGKILL, run.err
    assert codes[survivor] == 1, run.err
    last = run.err[survivor].splitlines()[-1]
    assert last.startswith(f"stopped: process {which} (")
    assert "is lost: no heartbeat" in last
    assert "Thread 0x" in run.err[survivor]
    finish(toy, workdir, *flags, processes=2, devices=2)
    assert_same_run(workdir, together, 60)
    outcome("recovered", kills=1)


@pytest.mark.fault(34)
@FULL
@pytest.mark.parametrize("shapes", [((1, 8), (2, 2), (1, 1)), ((2, 1), (4, 1))], ids=str)
def test_moved_between_processes_and_devices(toy, together, tmp_path, outcome, shapes):
    workdir, flags = tmp_path / "run", toy.flags(**TOGETHER)
    for (processes, devices), moment in zip(shapes[:-1], ("step 23/", "step 43/"), strict=False):
        run = Watched(toy, workdir, *flags, processes=processes, devices=devices)
        run.until_line(moment)
        run.kill()
    processes, devices = shapes[-1]
    finish(toy, workdir, *flags, processes=processes, devices=devices)
    assert_same_run(workdir, together, 60)
    outcome("recovered", len(shapes) - 1, kills=sum(p for p, _ in shapes[:-1]))


@pytest.mark.fault(34)
@FULL
def test_fsdp_and_bfloat16_move_too(toy, tmp_path, outcome):
    flags = toy.flags(**TOGETHER, model__dtype="bfloat16", optimizer__name="adamw")
    finish(toy, tmp_path / "straight", *flags)
    run = Watched(toy, tmp_path / "moved", *flags, "--config.mesh.fsdp=4", processes=2, devices=4)
    run.until_line("step 23/")
    run.kill()
    finish(toy, tmp_path / "moved", *flags, "--config.mesh.fsdp=2", devices=2)
    assert_same_run(tmp_path / "moved", tmp_path / "straight", 60)
    outcome("recovered", kills=2)


@pytest.mark.fault(29)
@FULL
def test_two_jobs_in_one_workdir(toy, undisturbed, tmp_path, outcome):
    workdir, flags = tmp_path / "run", toy.flags(**SHORT)
    first = Watched(toy, workdir, *flags)
    first.until_line("step 3/")
    second = toy.run("train", f"--workdir={workdir}", *flags)
    assert second.returncode == 2, second.stderr
    assert second.stderr.count("\n") == 1, second.stderr
    assert f"error: --workdir: '{workdir}' is in use by process {first.process.pid} on " in second.stderr
    assert first.finish()[0] == [0], first.err
    assert_same_run(workdir, undisturbed, STEPS)
    outcome("detected")


# Starved


@pytest.fixture
def own_corpus(toy, tmp_path) -> Path:
    return shutil.copytree(toy.corpus, tmp_path / "corpus")


@pytest.mark.fault(17)
@FULL
def test_an_input_that_stalls(toy, own_corpus, tmp_path, outcome):
    """A pipe in the place of a shard: whoever opens it waits for ever."""
    flags = toy.flags(**{**SHORT, "data__corpus": own_corpus, "train__stall_timeout": 3.0, "train__steps": 100_000})
    run = Watched(toy, tmp_path / "run", *flags)
    run.until_line("step 20/")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pipe").replace(own_corpus / "train-00000.npy")
    codes, _ = run.finish()
    last = run.err[0].splitlines()[-1]
    assert codes == [1]
    assert last.startswith("stopped: ")
    assert "waiting for a batch" in last
    assert "Thread" in run.err[0]
    assert saved_steps(tmp_path / "run")[-1] >= 20
    outcome("detected")


@pytest.mark.fault(17)
@FULL
def test_an_input_that_fails(toy, own_corpus, tmp_path, outcome):
    flags = toy.flags(**{**SHORT, "data__corpus": own_corpus, "train__steps": 100_000})
    run = Watched(toy, tmp_path / "run", *flags)
    run.until_line("step 20/")
    content = bytearray((own_corpus / "train-00000.npy").read_bytes())
    content[-1000:] = bytes(1000)
    (own_corpus / "train-00000.npy").write_bytes(content)
    codes, _ = run.finish()
    assert codes == [2], run.err
    assert run.err[0].count("\n") == 1, run.err
    assert run.err[0].startswith(f"error: {own_corpus}/train-00000.npy is damaged: row ")
    outcome("detected")


def limit_files(pid: int, size: int) -> None:
    """No file of the process can grow over `size` bytes, as on a full disk; -1: they can again."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))


@pytest.mark.fault(18)
@FULL
def test_a_disk_that_is_full_for_a_while(toy, undisturbed, tmp_path, outcome):
    workdir = tmp_path / "run"
    run = Watched(toy, workdir, *toy.flags(**SHORT))
    run.until_line("step 52/")
    limit_files(run.process.pid, 10)
    run.until_line("WARNING: step ")
    limit_files(run.process.pid, -1)
    codes, out = run.finish()
    assert codes == [0], run.err
    assert "WARNING: metrics.jsonl cannot be written" in "".join(run.lines)
    assert "is the last one saved" in out
    assert_same_run(workdir, undisturbed, STEPS)
    outcome("recovered")


@pytest.mark.fault(19)
@FULL
def test_a_disk_that_stays_full(toy, undisturbed, tmp_path, outcome):
    workdir, flags = tmp_path / "run", toy.flags(**SHORT)
    run = Watched(toy, workdir, *flags)
    run.until_line("step 52/")
    limit_files(run.process.pid, 10)
    codes, _ = run.finish()
    assert codes == [1], run.err
    last = run.err[0].splitlines()[-1]
    assert last.startswith("stopped: step ")
    assert re.search("3 saves in a row have failed; step [45]0 is the last one saved", last)
    finish(toy, workdir, *flags)
    assert_same_run(workdir, undisturbed, STEPS)
    outcome("recovered", 3)


@pytest.mark.fault(20)
@pytest.mark.parametrize("where", ["file/run", "/proc/run"])
def test_a_workdir_that_cannot_be(toy, tmp_path, outcome, where):
    (tmp_path / "file").write_text("")
    done = toy.run("train", f"--workdir={tmp_path / where}", *toy.flags())
    assert done.returncode == 2
    assert done.stderr.startswith("error: --workdir: '")
    assert done.stderr.count("\n") == 1
    outcome("detected")


# Another run's


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("optimizer.name", "adamw", marks=pytest.mark.fault(39)),
        pytest.param("optimizer.beta2", 0.5, marks=pytest.mark.fault(39)),
        pytest.param("tokenizer.vocab_size", 500, marks=pytest.mark.fault(40)),
        pytest.param("seed", 1, marks=pytest.mark.fault(41)),
        pytest.param("train.global_batch_size", 32, marks=pytest.mark.fault(41)),
        pytest.param("data.seq_len", 16, marks=pytest.mark.fault(41)),
        pytest.param("train.phases", "50%: objective.mask_rate=0.4", marks=pytest.mark.fault(41)),
        pytest.param("train.steps", 7, marks=pytest.mark.fault(41)),
        pytest.param("train.reproducible", True, marks=pytest.mark.fault(41)),
        pytest.param("objective.mask_rate", 0.4, marks=pytest.mark.fault(41)),
    ],
)
def test_a_workdir_of_another_run(trained_run, outcome, name, value):
    c = from_dict(json.loads((trained_run / "config.json").read_text()))
    run_config.take(trained_run, build(c))
    c.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=f"holds a run with {name} = .*, and this one has {value}"):
        run_config.take(trained_run, build(c))
    outcome("detected")


@pytest.mark.fault(40)
@FULL
def test_another_tokenizer_than_the_corpus_has(toy, trained_run, tmp_path, outcome):
    other = tmp_path / "corpus"
    made = toy.run(
        "prepare", *toy.flags(data__corpus="", data__source=f"text:{toy.text}", tokenizer__vocab_size=390),
        f"--output={other}",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    done = toy.run("evaluate", f"--checkpoint={trained_run}", f"--config.data.corpus={other}")
    assert done.returncode == 2
    assert "was made with another tokenizer" in done.stderr
    outcome("detected")


# Numbers


@pytest.mark.fault(47)
def test_non_finite_losses_stop_the_run_with_a_finite_checkpoint(toy, tmp_path, outcome):
    changes = {"optimizer__learning_rate": 1e30, "optimizer__max_skipped_steps": 3, "optimizer__name": "adamw"}
    run = Watched(toy, tmp_path / "run", *toy.flags(**changes))
    codes, _ = run.finish()
    assert codes == [2], run.err
    assert run.err[0].startswith("stopped: ")
    assert "steps in a row had a non-finite loss" in run.err[0]
    assert "lower optimizer.learning_rate" in run.err[0]
    assert run.err[0].count("\n") == 1
    (step,) = saved_steps(tmp_path / "run")
    assert f"step {step} is saved" in run.err[0]
    assert all(np.isfinite(value).all() for value in arrays(tmp_path / "run", step).values())
    assert metrics_of(tmp_path / "run")[-1]["skipped"] >= 3
    outcome("detected", 3)


def test_a_run_that_gave_up_stays_so_and_costs_no_checkpoint(toy, tmp_path):
    """It saves at every step, also where the updates are skipped, and keeps two by schedule."""
    changes = {"name": "adamw", "learning_rate": 1e-3, "max_skipped_steps": 2, "spike_action": "skip"}
    flags = toy.flags(train__checkpoint_every=1, **{f"optimizer__{name}": value for name, value in changes.items()})
    flags.append("--config.optimizer.spike_threshold=1e-9")  # from step 26 on nearly all updates are skipped
    first = Watched(toy, tmp_path / "run", *flags)
    codes, _ = first.finish()
    assert codes == [2], first.err
    steps, metrics = saved_steps(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_text()
    assert len(steps) == 4, "the two before the first skipped update are kept"
    again = Watched(toy, tmp_path / "run", *flags)
    codes, _ = again.finish()
    assert codes == [2], again.err
    assert f"holds a run that gave up at step {steps[-1]}: 2 steps in a row had" in again.err[0]
    assert f"delete checkpoints/{steps[-1]} to go on" in again.err[0]
    assert saved_steps(tmp_path / "run") == steps
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_run_whose_updates_were_all_skipped_is_not_finished(toy, tmp_path):
    """Though it had fewer steps than may be skipped in a row."""
    flags = toy.flags(optimizer__name="adamw", optimizer__learning_rate=3e38, train__steps=5)
    run = Watched(toy, tmp_path / "run", *flags, "--config.optimizer.warmup_fraction=0.0")
    codes, _ = run.finish()
    assert codes == [2], run.err
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.fault(48)
@FULL
def test_spikes_without_end_stop_the_run(toy, tmp_path, outcome):
    changes = {"spike_action": "skip", "spike_threshold": 0.01, "max_skipped_steps": 3}
    flags = toy.flags(**SHORT, **{f"optimizer__{name}": value for name, value in changes.items()})
    run = Watched(toy, tmp_path / "run", *flags)
    codes, _ = run.finish()
    assert codes == [2], run.err
    assert run.err[0].startswith("stopped: 3 steps in a row had a non-finite loss or gradient, or a spike")
    outcome("detected", 3)
