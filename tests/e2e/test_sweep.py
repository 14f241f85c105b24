"""Sweeps: the grid is a product, every run is train's own, nothing is done twice, the table says what the runs did."""

import fcntl
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_mlm.cli import sweep
from flax_mlm.cli.app import config_of
from flax_mlm.config.load import build, from_dict
from flax_mlm.configs import base
from flax_mlm.errors import UserError
from flax_mlm.sweep import failure_reason, run_all
from flax_mlm.training import run_config
from tests.helpers.runs import PATIENCE, Watched

BASE = [f"--config={base.__file__}"]
TEXTS = st.text(st.characters(codec="utf8", exclude_characters='"\n', exclude_categories=("C", "Z")), max_size=20)
VALUES = {
    "optimizer.name": st.sampled_from(["adamw", "lamb", "muon"]),
    "optimizer.learning_rate": st.floats(1e-9, 1e9),
    "model.scan_layers": st.none() | st.booleans(),
    "model.num_layers": st.integers(1, 2**31 - 1),
    "model.glu": st.booleans(),
    "data.source": TEXTS,
    "train.phases": st.sampled_from(["", "50%: objective.name=clm, objective.mask_rate=0.3; 75%: objective.name=mlm"]),
}


def spelt(value) -> st.SearchStrategy[str]:
    """How a value may be written."""
    if value is None:
        return st.just("none")
    return st.sampled_from([f'"{value}"'] if re.search("[,;&]", str(value)) else [str(value), f'"{value}"'])


@st.composite
def grids(draw) -> tuple[str, list[int], list[dict]]:
    """A grid as text, how many values each part has, and its settings."""
    paths = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, unique=True))
    space, parts, axes = st.sampled_from(["", " "]), [], []
    while paths:
        joined, paths = (some := draw(st.integers(1, len(paths)))) and paths[:some], paths[some:]
        axis = draw(st.lists(st.tuples(*(VALUES[p] for p in joined)), min_size=1, max_size=3, unique=True))
        texts = ["&".join(map(draw, map(spelt, values))) for values in axis]
        parts.append("&".join(joined) + draw(space) + "=" + draw(space) + f"{draw(space)},".join(texts))
        axes.append([dict(zip(joined, values, strict=True)) for values in axis])
    expected = [{k: v for d in point for k, v in d.items()} for point in itertools.product(*axes)]
    return f"{draw(space)};{draw(space)}".join(parts) + draw(st.sampled_from(["", ";"])), list(map(len, axes)), expected


@settings(max_examples=150, deadline=None)
@given(grids())
def test_a_grid_is_the_product_of_its_lists(grid):
    text, sizes, expected = grid
    found = sweep.parse_grid(text)
    assert found == expected
    assert len(found) == math.prod(sizes)
    names = {sweep.folder_name(setting, seed) for setting in found for seed in range(2)}
    assert len(names) == 2 * len(found)
    assert all(re.fullmatch(r"[\w.+-]{1,200}", name, re.ASCII) for name in names)


def test_a_value_in_quotes_may_go_over_several_lines():
    text = "0%: objective.mask_rate=0.3;\n 50%: objective.mask_rate=0.15"
    assert sweep.parse_grid(f'train.phases=,"{text}"')[1] == {"train.phases": text}


def test_folders_of_other_settings_have_other_names():
    texts = ["a/b", "a_b", "a b", "a  b", "A_b", "", "x" * 300, "x" * 301, "ä", "../..", "1+train.steps-2"]
    found = [sweep.folder_name({"data.source": text}, 0) for text in texts]
    found.append(sweep.folder_name({"data.source": "1", "train.steps": 2}, 0))
    assert len(set(found)) == len(found)
    assert all(re.fullmatch(r"data\.source-[\w.+-]{1,190}", name) for name in found)


@settings(max_examples=30, deadline=None)
@given(grids(), st.integers(0, 99))
def test_each_point_is_a_config_with_its_values(grid, seed):
    for setting in grid[2][:3]:
        run = sweep.make_run(BASE, setting, seed, Path("nowhere"))
        assert run.arguments[-1] == f"--workdir={run.workdir}"
        assert run.config == config_of(run.arguments[:-1])
        for path, value in {**setting, "seed": seed}.items():
            node = run.config
            for name in path.split("."):
                node = getattr(node, name)
            assert node == value


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("", "--grid is missing; expected field=value,value"),
        ("optimizer.name", "'optimizer.name' has no values"),
        ("optimizer.nme=muon", "config has no field 'optimizer.nme'; did you mean 'optimizer.name'?"),
        (
            "optimizer.name=adamw,mun",
            "optimizer.name=mun: optimizer.name is 'mun'; expected one of adamw",
        ),
        ("train.steps=5,many", "train.steps is 'many'; expected a whole number"),
        ("train.steps=5,", "train.steps is ''; expected a whole number"),
        ("model.num_heads=2,3; train.steps=9", "model.num_heads=3, train.steps=9: model.hidden_size is 128"),
        ("train.steps=100,1e2", "--grid names train.steps=100 twice"),
        ("train.steps=1;train.steps=2", "--grid names train.steps twice"),
        ("train.steps&train.steps=1&2", "--grid names train.steps twice"),
        ("train.steps&seed=1&2", "--grid cannot vary seed; use --seeds=3"),
        ("train.steps&optimizer.name=1&muon,2", "'2' has 1 of the 2 values of train.steps&optimizer.name"),
        ('data.source="text:a', "a double quote is not closed"),
    ],
)
def test_wrong_grids(toy, tmp_path, grid, said):
    done = toy.run("sweep", f"--grid={grid}", "--workdir=w", cwd=tmp_path)
    assert done.returncode == 2, done
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done
    assert said in done.stderr
    assert not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "said"),
    [("--workdir=", "--workdir is missing"), ("--workdir=gs://b/w", "gs://b/w"), ("--workdir=/proc/w", "'/proc/w'")],
)
def test_wrong_workdirs(toy, argument, said):
    done = toy.run("sweep", "--grid=train.steps=1", argument)
    assert done.returncode == 2, done
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done
    assert said in done.stderr, done


def test_a_dry_run_prints_the_commands_and_does_nothing(toy, tmp_path):
    grid = 'train.phases=,"50%: objective.name=clm, objective.mask_rate=0.3"; optimizer.name=adamw,muon'
    line = ["--config.train.steps", "1e3", "--config.seed=5", f"--grid={grid}", "--seeds=3", "--workdir=w"]
    done = toy.run("sweep", *line, "--dry_run", cwd=tmp_path)
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])
    *lines, last = done.stdout.splitlines()
    assert last == "4 settings × 3 seeds = 12 runs, 0 finished"
    assert len(set(lines)) == 12
    assert lines[4] == (
        "python -m flax_mlm.train --config.train.steps=1000 --config.seed=5 --config.train.phases= "
        "--config.optimizer.name=muon --config.seed=6 --workdir=w/optimizer.name-muon+train.phases-+seed-6"
    )


# Whole sweeps

GRID = "--grid=optimizer.learning_rate=1e-2,1e-4"
NAMES = [f"optimizer.learning_rate-{rate}+seed-0" for rate in ("0.01", "0.0001")]
STEPS = 300  # as others have, whose programs are compiled then


def flags(toy) -> list[str]:
    return toy.flags(train__steps=STEPS, train__eval_every=50, eval__max_rows=16)


def wait_for(file: Path, text: str, process) -> None:
    end = time.monotonic() + PATIENCE
    while not (file.exists() and text in file.read_text()):
        assert process.poll() is None, (process.returncode, f"no '{text}' in {file}")
        assert time.monotonic() < end, (process.returncode, f"no '{text}' in {file}")
        time.sleep(0.005)


def numbers(workdir: Path) -> dict[str, dict]:
    """The last evaluation of each run."""
    found = {}
    for folder in workdir.glob("*/"):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found[folder.name] = [line for line in lines if line["kind"] == "validation"][-1]
    return found


@pytest.fixture(scope="module")
def swept(toy) -> Path:
    """Stopped in its second run, asked for at the same time, and taken up again."""
    workdir = toy.folder / "swept"
    first = Watched(toy, workdir, *flags(toy), GRID, command="sweep")
    wait_for(workdir / NAMES[1] / "train.log", "\nstep 3/", first.process)
    second = toy.run("sweep", *flags(toy), GRID, f"--workdir={workdir}")
    assert second.returncode == 2, second
    assert "is in use by another sweep, or by a run of one" in second.stderr, second
    first.process.send_signal(signal.SIGTERM)
    codes, out = first.finish()
    assert codes == [75], (out, first.err)
    assert out.endswith("stopped by a signal; run the same command again to continue\n")
    assert "2 runs, 0 finished" in out
    assert "1/2  optimizer.learning_rate=0.01, seed=0  loss" in out
    assert "2/2" not in out
    assert not (workdir / NAMES[1] / "result.json").exists()
    assert "0/1 |" in (workdir / "sweep.md").read_text()
    assert (workdir / "sweep.png").exists()

    before = {p: p.stat().st_mtime_ns for p in (workdir / NAMES[0]).rglob("*")}
    done = toy.run("sweep", *flags(toy), GRID, f"--workdir={workdir}")
    assert done.returncode == 0, done
    (toy.folder / "swept.out").write_text(done.stdout)
    assert "2 runs, 1 finished" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert re.search(r"restored step \d+ from", (workdir / NAMES[1] / "train.log").read_text())
    return workdir


def test_a_sweep_that_was_stopped_ends_as_it_would_have(toy, swept):
    found = numbers(swept)
    assert set(found) == set(NAMES)
    assert all(line["step"] == STEPS for line in found.values())
    one, two = (found[name] for name in NAMES)
    assert one["tokens_seen"] == two["tokens_seen"] > 16 * STEPS, "the same rows, stopped or not"
    rows = json.loads((swept / "sweep.json").read_text())
    for row, rate, line in zip(rows, (0.01, 0.0001), (one, two), strict=True):
        assert row["setting"] == {"optimizer.learning_rate": rate}
        assert row["is_comparable"]
        for name in ("loss", "accuracy", "tokens_seen", "train_seconds"):
            assert row["mean"][name] == row["runs"][0][name] == line[name]
        assert line["loss"] == json.loads((Path(row["runs"][0]["workdir"]) / "result.json").read_text())["loss"]
    assert [row["is_best"] for row in rows] == [True, False]
    text = (swept / "sweep.md").read_text()
    assert text in (toy.folder / "swept.out").read_text()
    assert f"{two['loss'] - one['loss']:+.4f}" in text
    assert (swept / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not list(swept.rglob("*.tmp"))


def test_what_is_finished_is_not_done_again_and_settings_can_be_added(toy, swept):
    before = {p: p.stat().st_mtime_ns for p in swept.glob("*/**/*")}
    more = GRID.replace("1e-2,", "3e-3,1e-2,")
    done = toy.run("sweep", *flags(toy), more, "--seeds=2", f"--workdir={swept}", "--dry_run")
    assert "3 settings × 2 seeds = 6 runs, 2 finished" in done.stdout, done
    assert done.stdout.count("\n") == 5, done
    done = toy.run("sweep", *flags(toy), GRID.replace("1e-2,", ""), f"--workdir={swept}")
    assert done.returncode == 0, done
    assert done.stdout.count("(before)") == 1, done
    assert len(json.loads((swept / "sweep.json").read_text())) == 1, "the table is of what is asked for"
    assert before == {p: p.stat().st_mtime_ns for p in swept.glob("*/**/*")}


@pytest.mark.parametrize(("name", "value"), [("model.num_layers", 3), ("eval.max_rows", 8)])
def test_another_base_config_is_refused(toy, swept, name, value):
    before = {p: p.stat().st_mtime_ns for p in swept.rglob("*")}
    done = toy.run("sweep", *flags(toy), f"--config.{name}={value}", GRID, f"--workdir={swept}")
    assert done.returncode == 2, done
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done
    assert f"holds a run with {name} = " in done.stderr
    assert f"this one has {value}; use another" in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in swept.rglob("*")}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="elsewhere a run outlives the sweep")
def test_a_sweep_that_is_killed_takes_its_run_along(toy, tmp_path):
    workdir = tmp_path / "w"
    killed = Watched(toy, workdir, *flags(toy), "--grid=train.log_every=1", command="sweep")
    log = workdir / "train.log_every-1+seed-0" / "train.log"
    wait_for(log, "\nstep 3/", killed.process)
    killed.kill()
    folder = os.open(workdir, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # once the run has left
    os.close(folder)
    assert re.search(r"stopped by a signal; step \d+ is saved", log.read_text())
    assert not (log.parent / "result.json").exists()
    assert not (log.parent / "lease.json").exists()


def test_a_run_that_fails_does_not_stop_the_others(toy, tmp_path):
    grid = f"--grid=data.corpus={tmp_path / 'none'},{toy.corpus}"
    done = toy.run("sweep", *flags(toy), grid, f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 1, done
    assert not done.stderr, done
    assert re.search(r"^1/2  data.corpus=\S+, seed=0  FAILED: .*none.* \(exit code 2; ", done.stdout, re.MULTILINE)
    assert re.search(r"^2/2  .*  loss \d", done.stdout, re.MULTILINE)
    failed, other = json.loads((tmp_path / "w" / "sweep.json").read_text())
    assert "is not a corpus" in failed["runs"][0]["error"]
    assert not failed["mean"]
    assert other["mean"]["loss"] > 0
    assert not other["difference"]
    assert not other["is_best"]
    text = (tmp_path / "w" / "sweep.md").read_text()
    assert text.count("| – ") == 8
    assert failed["runs"][0]["error"] in text


# The table, of runs that are written down here


def test_the_ends_of_runs_are_one_point_though_they_are_not_of_one_step():
    """As with a budget."""
    curves = [[{"step": step} for step in steps] for steps in ((0, 100, 200, 253), (0, 100, 149))]
    found = [[line["step"] for line in lines] for lines in sweep.aligned(curves)]
    assert found == [[0, 0], [100, 100], [253, 149]]


def pretend(workdir: Path, setting: dict, seed: int, losses: dict[int, float], entropy: float = 6.0) -> sweep.Run:
    run = sweep.make_run([*BASE, "--config.train.steps=20"], setting, seed, workdir)
    run.workdir.mkdir(parents=True)
    lines = [
        {"step": step, "kind": "validation", "loss": loss, "accuracy": 0.25, "bits_per_byte": 1.5, "rows": 9,
         "unigram_entropy": entropy, "tokens_seen": 1000 * step, "train_seconds": step / 2}
        for step, loss in losses.items()
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in [{"step": 1, "kind": "train", "loss": 9.0}, *lines])
    (run.workdir / "metrics.jsonl").write_text(text + '{"step": 20, "ki')
    if 20 in losses:
        (run.workdir / "result.json").write_text(json.dumps({"loss": losses[20]}))
    return run


def test_the_table(tmp_path):
    a, b, c = ({"optimizer.beta1": beta} for beta in (0.9, 0.8, 0.7))
    runs = [
        pretend(tmp_path, a, 0, {10: 4.0, 20: 3.0}), pretend(tmp_path, a, 1, {10: 4.0, 20: 3.5}),
        pretend(tmp_path, b, 0, {10: 5.0, 20: 2.75}), pretend(tmp_path, b, 1, {10: 5.0, 20: 3.0}),
        pretend(tmp_path, c, 0, {10: 1.0, 20: 1.0}), pretend(tmp_path, c, 1, {10: 1.0}),
    ]  # fmt: skip
    sweep.write(tmp_path, runs, {})
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "sweep.md").read_text().splitlines()
    ]
    assert rows[0] == ["optimizer.beta1", "held-out loss", "vs. first", "accuracy", "bits/byte", "tokens", "seconds",
                       "tokens/s", "seeds"]  # fmt: skip
    same = ["0.2500", "1.500", "20,000", "10.0", "2,000"]
    assert rows[2] == ["0.9", "3.2500 ± 0.3536", "–", *same, "2/2"]
    assert rows[3] == ["0.8", "**2.8750 ± 0.1768**", "-0.3750 ± 0.1768", *same, "2/2"], "seed by seed"
    assert rows[4] == ["0.7", "1.0000", "-2.0000", *same, "1/2"], "of the seed that both have; not the best yet"
    assert (tmp_path / "sweep.png").exists()
    sweep.write(tmp_path, runs[-1:], {})
    assert not (tmp_path / "sweep.png").exists(), "it would be of other settings"


def test_a_run_whose_budget_cut_its_schedule_is_not_compared(tmp_path):
    a, b, c = ({"optimizer.beta1": beta} for beta in (0.9, 0.8, 0.7))
    runs = [pretend(tmp_path, setting, 0, {20: loss}) for setting, loss in ((a, 3.0), (b, 2.0), (c, 2.5))]
    file = runs[1].workdir / "metrics.jsonl"
    file.write_text(file.read_text().replace('"loss": 2.0', '"schedule_cut": 0.7, "loss": 2.0'))
    rows = sweep.summarise(runs, {})
    assert [row.is_best for row in rows] == [False, False, True]
    assert [row.difference for row in rows] == [[0.0], [], [-0.5]]
    assert "beta1=0.8, seed=0: for the last 70% of the schedule no time was left" in sweep.table(rows)


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_a_run_whose_loss_is_no_number_is_not_finished(tmp_path, loss):
    assert pretend(tmp_path, {"optimizer.beta1": 0.9}, 0, {20: loss}).result() is None


@pytest.mark.parametrize("content", ["", "{", "[3.0]", "null", '{"accuracy": 0.5}', '{"loss": NaN}', "\0" * 9])
def test_a_damaged_result_counts_as_missing(tmp_path, content):
    run = pretend(tmp_path, {"optimizer.beta1": 0.9}, 0, {20: 3.0})
    (run.workdir / "result.json").write_text(content)
    assert run.result() is None


@pytest.mark.parametrize(("code", "said"), [(0, "loss 3.0000"), (2, "FAILED: was trained on corpus aaa")])
def test_train_tells_whether_a_finished_run_under_other_paths_is_the_same(tmp_path, capsys, code, said):
    setting = {"optimizer.beta1": 0.9}
    run = pretend(tmp_path, setting, 0, {20: 3.0})
    (run.workdir / "config.json").write_text(json.dumps(run.config.to_dict()))
    (run.workdir / "train.log").write_text("$ line\nerror: was trained on corpus aaa\n")
    base = [*BASE, "--config.train.steps=20"]
    assert sweep.make_run(base, setting, 0, tmp_path).is_finished
    moved = sweep.make_run([*base, "--config.data.corpus=elsewhere"], setting, 0, tmp_path)
    assert not moved.is_finished
    trainer = SimpleNamespace(train=lambda *_: code, stopped=False)
    assert run_all([moved], trainer, tmp_path) == bool(code)
    assert f"optimizer.beta1=0.9, seed=0  {said}" in capsys.readouterr().out
    assert ("aaa" in (tmp_path / "sweep.md").read_text()) == bool(code)


@pytest.mark.parametrize("content", [None, "", "{"])
def test_the_config_of_a_run_that_lost_it_comes_from_its_checkpoint(trained_run, tmp_path, content):
    run = shutil.copytree(trained_run, tmp_path / "run")
    values = from_dict(json.loads((run / "config.json").read_text()))
    (run / "config.json").unlink() if content is None else (run / "config.json").write_text(content)
    run_config.check(run, build(values))
    values.seed = 1
    with pytest.raises(UserError, match="holds a run with seed = 0, and this one has 1"):
        run_config.check(run, build(values))


def test_a_line_without_a_loss_is_no_result(tmp_path):
    run = pretend(tmp_path, {"optimizer.beta1": 0.9}, 0, {20: 3.0})
    (run.workdir / "metrics.jsonl").write_text('{"step": 20, "kind": "validation", "loss": null}\n')
    assert run.result() is None


@pytest.mark.parametrize(
    ("setting", "entropy", "compares"),
    [
        ({"objective.mask_rate": 0.4}, 6.0, True),
        ({"objective.z_loss": 1e-4}, 6.0, True),
        ({"objective.attend_across_documents": True}, 6.0, True),
        ({"objective.span_stop": 0.5}, 6.0, True),  # of spans, which these are not
        ({"objective.masking": "span"}, 6.0, False),
        ({"objective.mask_replace_prob": 0.9}, 6.0, False),
        ({"objective.name": "clm"}, 6.0, False),
        ({"train.phases": "50%: objective.name=clm"}, 6.0, False),
        ({"eval.mask_rate": 0.4}, 6.0, False),
        ({"tokenizer.vocab_size": 99}, 6.5, False),
    ],
)
def test_losses_of_other_questions_do_not_compare(tmp_path, setting, entropy, compares):
    first = {path: getattr(getattr(config_of(BASE), (p := path.split("."))[0]), p[1]) for path in setting}
    runs = [pretend(tmp_path, first, 0, {20: 3.0}), pretend(tmp_path, setting, 0, {20: 2.0}, entropy)]
    one, two = sweep.summarise(runs, {})
    assert one.is_comparable
    assert two.is_comparable is compares
    assert two.is_best is compares
    assert two.difference == ([-1.0] if compares else [])
    assert ("cannot be compared" in sweep.table([one, two])) is not compares


@pytest.mark.parametrize(
    ("log", "code", "said"),
    [
        ("$ old\nerror: of before\n$ new\nstep 1\nerror: the last\nnoise\n", 2, "the last (exit code 2; "),
        ("$ new\nTraceback:\n  x\nValueError: odd\n\n", 1, "ValueError: odd (exit code 1; "),
        ("$ new\nstep 1\n", -signal.SIGKILL, "ended by SIGKILL"),
        ("$ new\n", 1, "no output (exit code 1; "),
    ],
)
def test_the_reason_of_a_failure_comes_from_the_log_of_the_last_start(tmp_path, log, code, said):
    (tmp_path / "train.log").write_text(log)
    assert failure_reason(tmp_path, code).startswith(said)
