"""Whole runs: they finish, learn, go on elsewhere, and prove that they do. What they survive is in tests/faults."""

import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_mlm.checkpoint.format import newest_meta, stored_config
from flax_mlm.checkpoint.store import saved_steps
from flax_mlm.cli.app import config_of
from flax_mlm.config.load import build, from_dict
from flax_mlm.errors import Failure, UserError
from flax_mlm.finetuning.saving import save_model
from flax_mlm.inference.config import read_config
from flax_mlm.inference.load import load_model
from flax_mlm.train import train
from tests.helpers.runs import arrays, assert_same_run, finish, metrics_of

STEPS = 60
SHORT = {"train__steps": STEPS, "train__checkpoint_every": 10, "train__eval_every": 20, "model__vocab_multiple_of": 2}


def test_a_run_leaves_what_it_says_and_has_learned(toy, trained_run):
    log = (toy.kept / "trained.log").read_text()
    assert "Traceback" not in log
    assert "step 300/300  loss" in log
    assert {p.name for p in trained_run.iterdir()} == {"checkpoints", "config.json", "metrics.jsonl", "result.json"}
    assert saved_steps(trained_run) == [200, 300]
    result = json.loads((trained_run / "result.json").read_text())
    assert result["loss"] < 0.5 * result["unigram_entropy"]
    assert result["accuracy"] > 3 * result["majority_accuracy"]
    lines = metrics_of(trained_run)
    assert [line["step"] for line in lines] == [line["rows"] // 16 for line in lines] == list(range(1, 301))
    assert lines[-1]["learning_rate"] < lines[60]["learning_rate"]
    assert lines[-1]["skipped"] == 0
    assert len({line["batch_fingerprint"] for line in lines}) == 300
    build(from_dict(json.loads((trained_run / "config.json").read_text())))


def test_a_finished_run_says_so_and_stays_as_it_is(toy, trained_run):
    before = {p: p.read_bytes() for p in trained_run.rglob("*") if p.is_file()}
    done = toy.run("train", f"--workdir={trained_run}", *toy.flags())
    assert done.returncode == 0, done.stderr
    assert "this run is finished: 300 steps are done" in done.stdout
    assert before == {p: p.read_bytes() for p in trained_run.rglob("*") if p.is_file()}


def test_train_is_a_function_that_can_be_called_twice(toy, tmp_path):
    config = config_of(toy.flags(train__steps=6, train__eval_every=4, eval__max_rows=16))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    first = train(config, tmp_path / "first")
    second = train(config, str(tmp_path / "second"))
    assert first == second == json.loads((tmp_path / "first" / "result.json").read_text())
    assert train(config, tmp_path / "first") == first, "a finished run returns its result"
    (tmp_path / "first" / "result.json").write_text("")
    assert train(config, tmp_path / "first") == first, "half a result is made again"
    assert json.loads((tmp_path / "first" / "result.json").read_text()) == first
    other = config_of(toy.flags(train__steps=7))
    with pytest.raises(UserError, match=r"holds a run with train\.steps = 6"):
        train(other, tmp_path / "first")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert jax.sharding.get_abstract_mesh().empty
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e30))
    with pytest.raises(Failure, match="Try a lower optimizer"):
        train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=60)), tmp_path / "diverged")


@pytest.fixture(scope="module")
def straight(toy) -> Path:
    workdir = toy.folder / "straight"
    finish(toy, workdir, *toy.flags(**SHORT))
    return workdir


@pytest.mark.parametrize(
    "changes, where",
    [
        ({"mesh__data": 4, "mesh__fsdp": 2}, {"devices": 8}),
        ({"train__gradient_accumulation_steps": 2}, {}),
        ({"mesh__tensor": 2}, {"processes": 2}),  # which both feed the same rows
    ],
)
def test_it_goes_on_with_another_layout(toy, straight, tmp_path, changes, where):
    workdir = shutil.copytree(straight, tmp_path / "copy")
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    held = json.loads((workdir / "config.json").read_text())
    del held["optimizer"]["averaging"]  # as of a run that began before there was such a field
    (workdir / "config.json").write_text(json.dumps(held))
    out = finish(toy, workdir, *toy.flags(**SHORT, **changes), **where)
    assert "restored step 50" in out
    expected = arrays(straight, STEPS)
    for name, value in arrays(workdir, STEPS).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)
    for mine, theirs in zip(metrics_of(workdir), metrics_of(straight), strict=True):
        assert mine.pop("kind") == theirs.pop("kind")
        for name in ("predicted_tokens", "tokens", "batch_fingerprint"):
            assert mine.pop(name) == theirs.pop(name)
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_it_goes_on_with_the_same_corpus_under_another_path(toy, straight, tmp_path):
    workdir, corpus = shutil.copytree(straight, tmp_path / "copy"), shutil.copytree(toy.corpus, tmp_path / "corpus")
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    out = finish(toy, workdir, *toy.flags(**SHORT, data__corpus=corpus))
    assert "restored step 50" in out
    assert json.loads((workdir / "config.json").read_text())["data"]["corpus"] == str(corpus)
    assert_same_run(workdir, straight, STEPS)


def test_verify_resume_compares_whole_runs(toy, tmp_path):
    flags = [f for f in toy.flags() if "checkpoint_every" not in f]
    done = toy.run("verify_resume", *flags, "--steps=6", "--kills=1", "--shapes=1x2", f"--workdir={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [re.split(r"  +", line.strip()) for line in done.stdout.splitlines()]
    assert rows[0] == ["run", "devices", "batches", "parameters", "state", "metrics", "result"]
    by_name = {row[0]: row[2:] for row in rows[1:4]}
    assert by_name["straight"] == by_name["killed"]
    assert by_name["to 1x2"][0] == by_name["straight"][0]
    assert by_name["to 1x2"][1] != by_name["straight"][1], "not reproducible: the comparison would see it"
    assert "all guarantees hold" in done.stdout


def test_verify_resume_needs_steps_for_every_phase(toy):
    early = "--config.train.phases=0%: objective.mask_rate=0.2; 1%: objective.mask_rate=0.3"
    done = toy.run("verify_resume", early)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --steps is 30, which may be too few: train.phases: ")


PHASES = {"objective__name": "clm", "train__phases": "50%: objective.name=mlm, objective.mask_rate=0.3", **SHORT}


def test_phases_follow_each_other_in_one_run(toy, tmp_path, pytestconfig):
    """Next token for half of the steps, then masks; each checkpoint knows what it was trained with."""
    straight = tmp_path / "straight"
    out = finish(toy, straight, *toy.flags(**PHASES, train__keep_period=10))
    assert "recipe      clm, 60 steps of 16 rows" in out
    assert "from step 30 (50%) on objective.name=mlm" in out
    for line in metrics_of(straight):  # about 26 of 32 tokens are ordinary
        assert (line["predicted_tokens"] > 300) == (line["step"] <= 30), line
    evaluated = {line["step"]: line["predicted_tokens"] for line in metrics_of(straight, "validation")}
    assert evaluated[20] > 4 * evaluated[40], "the objective of the phase is what is evaluated"
    names = {step: read_config(f"{straight}@{step}").objective.name for step in (20, 30, 40, 60)}
    assert names == {20: "clm", 30: "clm", 40: "mlm", 60: "mlm"}
    done = toy.run("evaluate", f"--checkpoint={straight}@30")
    assert done.returncode == 0, done.stderr
    assert "held-out next-token loss" in done.stdout, done.stderr
    meta = newest_meta(f"{straight}@30")[1]
    del meta["config"]["train"]["cloze_every"]  # as one that was saved before there was such a field
    assert stored_config(meta).objective.name == "clm"
    damaged = shutil.copytree(straight, tmp_path / "damaged")
    for step in (40, 50, 60):
        shutil.rmtree(damaged / "checkpoints" / str(step) / "params" / "d", ignore_errors=True)
    done = toy.run("evaluate", f"--checkpoint={damaged}")
    assert done.returncode == 2, done
    assert "checkpoints/30' is of another phase of the run" in done.stderr, done

    # Killed before, at or after the change, it ends the same.
    for step in (20, 30, 40) if pytestconfig.getoption("--full") else (20,):
        workdir = shutil.copytree(straight, tmp_path / str(step))
        for later in saved_steps(workdir):
            if later > step:
                shutil.rmtree(workdir / "checkpoints" / str(later))
        out = finish(toy, workdir, *toy.flags(**PHASES, train__keep_period=10))
        assert f"restored step {step}" in out
        assert_same_run(workdir, straight, STEPS)


def test_clozes_go_into_the_logs(toy, tmp_path):
    """Of the built-in ones those that fit into the rows; numbers in metrics.jsonl, words in TensorBoard."""
    from flax_mlm.data.tf import tensorflow  # reads event files, which tensorboardX wrote

    flags = toy.flags(train__steps=4, train__cloze_every=2, log__tensorboard=True)
    out = finish(toy, tmp_path / "run", *flags)
    assert "step 2/4  clozes  top1 " in out
    lines = metrics_of(tmp_path / "run", "cloze")
    assert [line["step"] for line in lines] == [2]
    assert 0 < lines[0]["clozes"] < 8
    assert 0 <= lines[0]["top1"] <= lines[0]["top5"] <= 1
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    events = tensorflow().compat.v1.train.summary_iterator(str(file))
    texts = [v.tensor.string_val[0] for e in events for v in e.summary.value if v.tag.startswith("cloze/text")]
    assert len(texts) == 1
    assert b"The [MASK] sat on the mat.\n    " in texts[0]
    assert b": rank " in texts[0]


def test_the_average_of_the_weights_is_what_a_run_is_judged_by(toy, straight, tmp_path):
    """LAWA's, against the mean of the weights in the checkpoints; the run itself is that without one."""
    workdir = tmp_path / "run"
    changes = {"optimizer__averaging": "lawa", "optimizer__lawa_every": 10, "optimizer__lawa_count": 3}
    flags = toy.flags(**SHORT, **changes, train__keep_period=10)
    assert "; evaluates the lawa average of the weights" in finish(toy, workdir, *flags)
    final, latest = arrays(workdir, STEPS), [arrays(workdir, step) for step in (40, 50, 60)]
    names = [name for name in final if name.startswith("params")]
    for name in names:
        mean = np.mean([each[name] for each in latest], axis=0)
        np.testing.assert_allclose(final[name.replace("params", "average", 1)], mean, atol=1e-6, err_msg=name)
    for name, value in arrays(straight, STEPS).items():
        np.testing.assert_allclose(final[name], value, atol=1e-5, err_msg=name)

    def loss(*more: str) -> float:
        file = tmp_path / "loss.json"
        done = toy.run("evaluate", f"--checkpoint={workdir}", f"--json={file}", *more)
        assert done.returncode == 0, done.stderr
        return json.loads(file.read_text())["loss"]

    averaged, last = (json.loads((run / "result.json").read_text())["loss"] for run in (workdir, straight))
    assert loss() == pytest.approx(averaged, abs=1e-6)
    assert averaged != pytest.approx(last, abs=1e-3)
    assert loss("--config.optimizer.averaging=none") == pytest.approx(last, abs=1e-4)

    # An encoder fine-tuned from the average has one set of weights.
    config = build(read_config(str(workdir)))
    model = load_model(str(workdir), config)
    with jax.set_mesh(model.mesh):
        save_model(tmp_path / "tuned", model, {"encoder": model.params["encoder"]}, 1)
    tuned = load_model(str(tmp_path / "tuned"), config)
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((model.params, tuned.params)))

    killed = shutil.copytree(workdir, tmp_path / "killed")
    for later in (50, 60):
        shutil.rmtree(killed / "checkpoints" / str(later))
    assert "restored step 40" in finish(toy, killed, *flags)
    assert_same_run(killed, workdir, STEPS)
