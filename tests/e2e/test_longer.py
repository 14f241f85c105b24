"""A run that is made longer goes on as one that was as long from the start, or says what stands in the way."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from flax_mlm.checkpoint.store import saved_steps
from flax_mlm.cli.app import config_of
from flax_mlm.config.phases import parse_phases
from flax_mlm.errors import UserError
from flax_mlm.training import extension
from flax_mlm.training.extension import Done
from flax_mlm.training.run_config import record, take
from tests.helpers.runs import arrays, finish, metrics_of

WARM = {"optimizer__warmup_steps": 7}
KINDS = {
    "constant": {"optimizer__schedule": "constant", **WARM},
    "wsd before its decay": {"optimizer__schedule": "wsd", "optimizer__decay_fraction": 0.25, **WARM},
    "schedule-free": {"optimizer__name": "schedule_free", "optimizer__schedule": "constant", **WARM},
    "another warm-up after the decay": {"optimizer__schedule": "linear"},
    "phases in steps": {
        "optimizer__schedule": "constant", **WARM, "optimizer__averaging": "ema",
        "train__phases": "0: objective.mask_rate=0.3->0.15; 9: train.global_batch_size=8",
    },
    "tokens": {"optimizer__schedule": "constant", **WARM, "train__tokens": 6000},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_made_longer_equals_one_that_was_as_long_from_the_start(toy, tmp_path, kind):
    changes = {"train__steps": 16, "train__checkpoint_every": 4, "eval__max_rows": 16, **KINDS[kind]}
    longer = {**changes, "train__steps": 26}
    if kind == "tokens":
        longer["train__tokens"] = 10_000
    if kind == "another warm-up after the decay":
        longer["train__phases"] = "16: optimizer.warmup_steps=3"
    short, long = tmp_path / "short", tmp_path / "long"
    finish(toy, long, *toy.flags(**longer))
    last = saved_steps(long)[-1]
    finish(toy, short, *toy.flags(**changes))
    if kind == "wsd before its decay":
        shutil.rmtree(short / "checkpoints" / "16")
    finish(toy, short, *toy.flags(**longer))
    mine, theirs = arrays(short, last), arrays(long, last)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name, strict=True)
    mine, theirs = ([{**line, "progress": 0} for line in metrics_of(run)] for run in (short, long))
    assert mine == theirs
    assert json.loads((short / "config.json").read_text()) == json.loads((long / "config.json").read_text())
    assert (short / "result.json").read_text() == (long / "result.json").read_text()
    assert "this run is finished" in finish(toy, short, *toy.flags(**longer))


def configs(changes: dict[str, object], longer: dict[str, object]):
    base = {"train.steps": 100, "optimizer.warmup_fraction": 0.0, **changes}
    return [
        config_of(["--config=base", *(f"--config.{k}={v}" for k, v in c.items())]) for c in (base, {**base, **longer})
    ]


STEPS, CONSTANT, WSD = {"train.steps": 200}, {"optimizer.schedule": "constant"}, {"optimizer.schedule": "wsd"}
AFTER_50 = Done(50, 0.5)
AFTER_100 = Done(100, 1.0)


@pytest.mark.parametrize(
    ("changes", "longer", "done", "reason"),
    [
        ({}, STEPS, AFTER_50, "schedule=linear decays from the warm-up on; let a phase after it warm up again: "
         "--config.train.phases='100: optimizer.warmup_steps=5'"),
        ({"optimizer.schedule": "cosine"}, STEPS, AFTER_50, "optimizer.schedule=cosine decays"),
        (WSD, STEPS, AFTER_100, "optimizer.schedule=wsd has decayed since step 80"),
        (WSD, STEPS, Done(82, 0.82), "optimizer.schedule=wsd has decayed since step 80"),
        ({**CONSTANT, "optimizer.warmup_fraction": 0.05}, STEPS, AFTER_50,
         "optimizer.warmup_fraction=0.05 is a fraction of the length; set optimizer.warmup_steps=5 for"),
        ({**CONSTANT, "optimizer.warmup_fraction": 0.055}, STEPS, AFTER_50,
         "set optimizer.warmup_fraction=0.0275 for"),
        ({**CONSTANT, "train.phases": "50%: objective.mask_rate=0.2"}, STEPS,
         Done(10, 0.1), "train.phases has a phase from 50% on, which would move; write where it begins in steps"),
        ({**CONSTANT, "train.phases": "0%: objective.mask_rate=0.3->0.15"}, STEPS, AFTER_50,
         "changes a value until its end, 100; begin another one there"),
        ({**CONSTANT, "train.phases": "20: objective.mask_rate=0.3"},
         {**STEPS, "train.phases": "30: objective.mask_rate=0.3"}, AFTER_50, "ends the first phase before it has"),
        ({**CONSTANT, "train.phases": "20: objective.mask_rate=0.3"},
         {**STEPS, "train.phases": ""}, AFTER_50, "train.phases has another phase instead of|ends the first phase"),
        (CONSTANT, {**STEPS, "train.phases": "49: objective.mask_rate=0.3"}, AFTER_50,
         "ends the first phase before it has ended"),
        ({**CONSTANT, "optimizer.averaging": "lawa", "optimizer.lawa_every": 4,
          "optimizer.lawa_count": 5}, {"train.steps": 130}, AFTER_50, "a multiple of .* = 20, not 30"),
        ({"optimizer.name": "schedule_free", **CONSTANT, "optimizer.warmup_fraction": 0.1}, STEPS,
         AFTER_50, "set optimizer.warmup_steps=10 for"),
        (CONSTANT, {"train.steps": 99}, AFTER_50, "length, train.steps, which can be raised"),
        (CONSTANT, {"train.tokens": 1e6}, AFTER_50, "length, train.steps, which can be raised"),
        ({"train.budget_minutes": 10.0}, {"train.budget_minutes": 20.0}, AFTER_50,
         "linear decays .*'10: optimizer.warmup_fraction"),
        ({"train.budget_minutes": 10.0, "optimizer.schedule": "constant", "optimizer.warmup_fraction": 0.1},
         {"train.budget_minutes": 20.0}, AFTER_50, "set optimizer.warmup_fraction=0.05 for"),
    ],
)  # fmt: skip
def test_a_longer_run_with_another_past_is_refused_by_name(changes, longer, done, reason):
    old, new = configs(changes, longer)
    said = extension.why_not(old, new, done, parse_phases)
    assert re.search(reason, said), said


@pytest.mark.parametrize(
    ("changes", "longer", "done"),
    [
        ({}, STEPS, Done()),  # nothing is done
        ({}, {**STEPS, "train.phases": "100: optimizer.warmup_steps=5"}, AFTER_50),
        ({}, {**STEPS, "train.phases": "100: optimizer.warmup_steps=5"}, AFTER_100),
        (WSD, STEPS, Done(79, 0.79)),
        (WSD, {**STEPS, "optimizer.decay_fraction": 0.1}, Done(79, 0.79)),
        (CONSTANT, STEPS, AFTER_100),
        ({**CONSTANT, "optimizer.warmup_fraction": 0.05},
         {**STEPS, "optimizer.warmup_steps": 5}, AFTER_50),
        ({**CONSTANT, "optimizer.warmup_fraction": 0.055},
         {**STEPS, "optimizer.warmup_fraction": 0.0275}, AFTER_50),
        ({**CONSTANT, "train.phases": "0%: objective.mask_rate=0.3"}, STEPS, AFTER_50),
        ({**CONSTANT, "train.phases": "20%: objective.mask_rate=0.3"},
         {**STEPS, "train.phases": "20: objective.mask_rate=0.3"}, AFTER_50),
        ({**CONSTANT, "optimizer.averaging": "lawa", "optimizer.lawa_every": 4,
          "optimizer.lawa_count": 5}, {"train.steps": 140}, AFTER_50),
        ({"train.budget_minutes": 10.0, "optimizer.schedule": "constant"}, {"train.budget_minutes": 20.0}, AFTER_50),
        ({"train.budget_minutes": 10.0, "optimizer.schedule": "wsd", "optimizer.warmup_steps": 5},
         {"train.budget_minutes": 20.0}, AFTER_50),
        ({"train.budget_minutes": 10.0},
         {"train.budget_minutes": 20.0, "train.phases": "10: optimizer.warmup_fraction=0.05"}, AFTER_100),
    ],
)  # fmt: skip
def test_a_longer_run_with_the_same_past_goes_on(changes, longer, done):
    old, new = configs(changes, longer)
    assert extension.why_not(old, new, done, parse_phases) == ""


def test_what_a_refusal_proposes_is_accepted(trained_run, tmp_path):
    """A finished run with a linear decay: the message names the phase with which it can go on."""
    workdir = Path(shutil.copytree(trained_run, tmp_path / "run"))
    line = [f"--config={workdir / 'config.py'}"]
    stored = (workdir / "config.json").read_text()
    (workdir / "config.py").write_text(
        f"import json\nfrom flax_mlm.config.load import from_dict\n"
        f"def get_config():\n    return from_dict(json.loads({stored!r}))\n"
    )
    with pytest.raises(UserError, match=r"train\.steps = 300, and this one has 600: .*; or use another --workdir") as e:
        take(workdir, config_of([*line, "--config.train.steps=600"]))
    assert (workdir / "config.json").read_text() == stored
    proposed = str(e.value).partition("--config.train.phases='")[2].partition("'")[0]
    longer = config_of([*line, "--config.train.steps=600", f"--config.train.phases={proposed}"])
    take(workdir, longer)
    record(workdir, longer)
    assert json.loads((workdir / "config.json").read_text()) == longer.to_dict()
    with pytest.raises(UserError, match=r"holds a run with train\.steps = 600, and this one has 300"):
        take(workdir, config_of(line))


def test_a_phase_that_warms_up_again_begins_another_schedule():
    _, config = configs(
        {}, {"train.steps": 100, "train.phases": "60: optimizer.warmup_steps=10", "optimizer.warmup_steps": 20}
    )
    first, second = parse_phases(config)
    rates = np.concatenate(
        [extension._rates(p, np.arange(p.first_step, p.first_step + p.num_steps)) for p in (first, second)]
    )
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[19] == rates[20] == 1.0
    assert rates[59] == pytest.approx(1 / 40, rel=1e-4)
    assert rates[60] == pytest.approx(1 / 10)
    assert rates[69] == rates[70] == 1.0
    assert rates[99] == pytest.approx(1 / 30, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.warmup_steps": 101}, "warmup_steps is 101; expected at most 100, the steps of its"),
        ({"optimizer.warmup_steps": 81, **WSD}, "expected at most 80, the steps before the decay"),
        ({"train.phases": "90: optimizer.warmup_steps=11"}, "optimizer.warmup_steps is 11; expected at most 10"),
        ({"train.budget_minutes": 9.0, "train.phases": "50%: optimizer.warmup_steps=9"},
         "warms up by optimizer.warmup_fraction"),
        ({"optimizer.name": "schedule_free", **CONSTANT, "train.phases": "5: optimizer.warmup_steps=9"},
         "which must stay the same with optimizer.name=schedule_free"),
    ],
)  # fmt: skip
def test_a_warm_up_in_steps_fits_into_its_schedule(changes, message):
    with pytest.raises(UserError, match=message):
        configs({}, changes)
