"""A run that ends when its time is used up, on a clock of the test's own, and in a real run."""

import itertools
import json
import re
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flax_mlm.errors import UserError
from flax_mlm.training import budget
from tests.helpers.runs import Watched, finish, metrics_of


class Clock:
    def __init__(self, monkeypatch):
        self.now = self.started = 0.0
        monkeypatch.setattr(budget.time, "monotonic", lambda: self.now)

    def start(self) -> None:
        """As a new process, that takes a while to get going."""
        self.started = self.now
        self.now += 20.0


def simulate(
    clock: Clock, workdir, seconds: float, step: list[float], kills: set[int], evaluate_every: int = 1000
) -> tuple[float, list[float]]:
    """Seconds that are used in the end, and the progress after each step. An evaluation takes 7 seconds; a kill costs
    the last 10 steps; that a step was the last becomes known when another one has been done."""
    clock.start()
    used, run, noted = 0.0, budget.Budget(workdir, seconds, clock.started), clock.now
    progress: list[float] = []
    for i in range(100_000):
        if i in kills:
            used += clock.now - clock.started
            clock.now += 5000.0  # away
            clock.start()
            run, noted = budget.Budget(workdir, seconds, clock.started), clock.now
            run.progress = progress[-10] if len(progress) > 10 else 0.0
        if i % evaluate_every == 0:
            with run.pause("evaluating"):
                clock.now += 7.0
        is_over = bool(progress) and progress[-1] >= 1.0
        progress.append(run.next_progress())
        clock.now += step[i * len(step) // 2000 % len(step)]
        if is_over:
            break
        if clock.now - noted >= run.interval:  # what a thread does
            run.note()
            noted = clock.now
    with run.pause("evaluating"):
        clock.now += 7.0
    return used + clock.now - clock.started, progress[:-1]


@settings(max_examples=20, deadline=None)
@example(600.0, [1.0], {20, 21})  # killed again as soon as it had started
@given(
    st.floats(600.0, 3600.0),
    st.lists(st.floats(0.2, 2.0), min_size=1, max_size=4),
    st.sets(st.integers(20, 900), max_size=3),
)
def test_it_ends_in_time_and_annealed(tmp_path_factory, seconds, step, kills):
    """Whatever a step takes, and however that changes; after kills, too."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = Clock(monkeypatch)
        used, progress = simulate(clock, tmp_path_factory.mktemp("run"), seconds, step, kills)
    # Of what a kill costs, the time since the last note is not known; after one in the last seconds, the start is late.
    assert 0.97 * seconds < used < 1.03 * seconds + (20.0 if kills else 0.0)
    assert progress[-1] == 1.0
    if not kills:
        assert progress == sorted(progress)
        last = 1 - (7.0 + 5 * max(step)) / (seconds - 60)
        assert progress[-2] > last, "it ends by degrees, not with a jump longer than an evaluation"


@pytest.mark.parametrize("evaluate_every", [1, 10, 1000])
def test_equal_steps_take_it_equally_far(monkeypatch, tmp_path, evaluate_every):
    """However much of the time goes to pauses: at every step seven seconds beside its one, too."""
    _, progress = simulate(Clock(monkeypatch), tmp_path, 1000.0, [1.0], set(), evaluate_every)
    gains = [b - a for a, b in itertools.pairwise(progress[20:-1:10])]
    assert min(gains) == pytest.approx(max(gains), rel=0.2)
    assert progress[-2] > 0.9


def test_time_is_kept_for_the_evaluation_of_the_phase_at_hand(monkeypatch, tmp_path):
    """Of longer rows, say, and not for the quickest there has been."""
    clock = Clock(monkeypatch)
    clock.start()
    run = budget.Budget(tmp_path, 1000.0, clock.started)
    run.next_progress()
    for seconds in (7.0, 100.0, 50.0):
        clock.now += 1.0  # the step
        run.forget("evaluating")
        with run.pause("evaluating"):
            clock.now += seconds
        run.progress, run._behind = 0.0, 0.0
        assert run.next_progress() == pytest.approx(1.0 / (budget._TARGET * 1000.0 - seconds - run.used() - 1.0))


def test_time_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "clock.json").write_text('{"seconds": "many"}')
    with pytest.raises(UserError, match=r"clock\.json', the time used, cannot be read .* to restart the budget"):
        budget.Budget(tmp_path, 60.0, time.monotonic())


def test_the_time_used_before_a_restart_counts(tmp_path):
    started = time.monotonic()
    first = budget.Budget(tmp_path, 1000.0, started)
    first.close()
    (tmp_path / "clock.json").write_text(json.dumps({"seconds": 500.0}))
    second = budget.Budget(tmp_path, 1000.0, started)
    second.close()
    assert 500 <= second.used() < 501 + time.monotonic() - started
    assert json.loads((tmp_path / "clock.json").read_text())["seconds"] >= 500


@pytest.mark.parametrize("begun", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("used", [590.0, 10_000.0])
def test_used_up_it_still_ends_annealed_and_says_what_was_cut(monkeypatch, tmp_path, capsys, begun, used):
    """A linear schedule, or wsd that decays over the last tenth, of a run whose restarts have taken the time."""
    clock = Clock(monkeypatch)
    clock.start()
    (tmp_path / "clock.json").write_text(json.dumps({"seconds": used}))
    begins = [0.0, 0.1, 0.11, 0.95, 0.951]
    run = budget.Budget(tmp_path, 600.0, clock.started, begins)
    run.progress, progress = begun, [begun]
    while progress[-1] < 1.0:
        progress.append(float(np.float32(run.next_progress())))
        clock.now += 1.0
    moves = [b - a for a, b in itertools.pairwise(progress)]
    assert max(moves) <= 0.2501 * (1 - begun)
    assert 1 - progress[-2] <= 0.01 * 0.1
    assert len(moves) < 35
    phases = [sum(begin <= p for begin in begins) for p in progress[:-1]]
    assert set(phases) == set(range(phases[0], 6)), "a step of each phase that was to come"
    assert run.cut() == {"schedule_cut": 1 - begun}
    assert f"is used up before the last {1 - begun:.0%} of the schedule" in capsys.readouterr().out
    run.close()
    assert budget.Budget(tmp_path, 600.0, clock.started).cut() == run.cut(), "after a restart, too"


def test_a_first_step_without_time_left_does_not_jump_to_the_peak(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    clock.start()
    run = budget.Budget(tmp_path, 3.0, clock.started)
    assert run.next_progress() <= 0.01
    assert run.next_progress() <= 0.03


def test_a_run_that_ends_by_degrees_is_not_called_cut(monkeypatch, tmp_path):
    simulate(Clock(monkeypatch), tmp_path, 600.0, [1.0], set(), evaluate_every=50)
    assert "cut_at" not in json.loads((tmp_path / "clock.json").read_text())


def test_a_start_that_takes_the_whole_budget(toy, tmp_path):
    """A real run: the rate falls to its end, each phase is entered, and the result says so."""
    changes = {"train__budget_minutes": 0.01, "train__phases": "50%: train.global_batch_size=8", "eval__max_rows": 16}
    out = finish(toy, tmp_path / "run", *toy.flags(**changes))
    lines = metrics_of(tmp_path / "run")
    rates = [line["learning_rate"] for line in lines]
    assert lines[-1]["progress"] == 1.0
    assert rates[-1] < 0.01 * max(rates)
    assert rates.index(max(rates)) >= 2, "it warms up"
    assert len(rates) - rates.index(max(rates)) > 10, "by degrees"
    assert {b - a for a, b in itertools.pairwise(line["rows"] for line in lines)} == {16, 8}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["schedule_cut"] == 1.0
    assert "WARNING: train.budget_minutes is used up before the last 100% of the schedule" in out
    assert "NOTE: for the last 100% of the schedule no time was left" in out


def test_a_run_with_a_budget(toy, tmp_path):
    """Killed on the way: it ends, annealed and evaluated, when the time is used, that before the kill included."""
    changes = {"train__budget_minutes": 1.2, "train__phases": "50%: train.global_batch_size=8", "eval__max_rows": 16}
    flags = toy.flags(**changes, train__checkpoint_every=20, optimizer__schedule="linear")
    workdir = tmp_path / "run"
    run = Watched(toy, workdir, *flags)
    run.until_path("checkpoints/20/commit_success.txt")
    run.kill()
    before = json.loads((workdir / "clock.json").read_text())["seconds"]
    assert 0 < before < 72
    restarted = time.monotonic()
    out = finish(toy, workdir, *flags)
    assert time.monotonic() - restarted < 72  # less than the budget, since what was before the kill counts
    assert re.search(r"from 50% on train\.global_batch_size=8", out)
    assert "restored step" in out
    lines = metrics_of(workdir)
    assert lines[-1]["progress"] == 1.0
    assert lines[-1]["learning_rate"] < 0.05 * 1e-2
    rows = [line["rows"] for line in lines]
    sizes = [b - a for a, b in itertools.pairwise(rows)]
    assert set(sizes) == {16, 8}
    assert sizes == sorted(sizes, reverse=True)
    assert [line["progress"] for line in lines] == sorted(line["progress"] for line in lines)
    used = json.loads((workdir / "clock.json").read_text())["seconds"]
    assert 0.9 * 72 < used < 1.03 * 72
    assert json.loads((workdir / "result.json").read_text())["loss"] > 0
    assert "this run is finished" in finish(toy, workdir, *flags)
