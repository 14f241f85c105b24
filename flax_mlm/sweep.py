"""Command: a config × a grid of settings × seeds -> the same training for each, one table, one plot.

    python -m flax_mlm.sweep --config=configs/quickstart.py --workdir=runs/sweep --seeds=3 \\
        --grid='optimizer.name=adamw,muon; objective.mask_rate=0.15,0.3'

Each is `python -m flax_mlm.train` in a process of its own, one after another, in a folder of --workdir. The same line
goes on after a kill; with more settings or seeds in it, those that are missing are done. More of grids is in grid.py.
"""

import contextlib
import ctypes
import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from flax_mlm.cli import app as command
from flax_mlm.cli import grid, tables
from flax_mlm.cli.grid import Setting, describe, spell
from flax_mlm.config import phases
from flax_mlm.config.schema import Config
from flax_mlm.errors import PREEMPTED, UserError
from flax_mlm.storage import files, gcs
from flax_mlm.training import metrics, run_config

_GRID = flags.DEFINE_string("grid", "", "field=value,value; field=value,...: all combinations; a&b=1&2,3&4: together")
_SEEDS = flags.DEFINE_integer("seeds", 1, "runs of each setting, from the config's seed on", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "", "folder of the runs, sweep.md, sweep.json and sweep.png")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the commands that would be run, and run nothing")

# As it is before the base config changes it (environment.prepare): each run sees to its own.
_ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}
# What a run may have been started with before: as in train, but for what decides its result.
_FREE = ("eval.batch_size", *(name for name in run_config.FREE if name != "eval."))
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # <sys/prctl.h>


class Run(NamedTuple):
    """One training."""

    setting: Setting
    seed: int
    workdir: Path
    arguments: list[str]  # of train
    config: Config

    @property
    def name(self) -> str:
        return f"{describe(self.setting)}, seed={self.seed}"

    def curve(self) -> list[dict[str, Any]]:
        """The evaluations so far, as metrics.jsonl has them."""
        return metrics.lines(self.workdir, "validation")

    def result(self) -> dict[str, Any] | None:
        """The last evaluation, of a run that is finished."""
        file, last = self.workdir / "result.json", self.curve()[-1:]
        is_finished = last and file.exists() and json.loads(file.read_text())["loss"] == last[0]["loss"]
        return last[0] if is_finished else None


def main(config: Config) -> int:
    settings = grid.parse_grid(_GRID.value)
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name a folder for the runs, such as --workdir=runs/sweep")
    gcs.refuse("--workdir", _WORKDIR.value)
    workdir = Path(_WORKDIR.value).expanduser()
    seeds = range(config.seed, config.seed + _SEEDS.value)
    base = command.config_arguments(sys.argv)
    runs = [make_run(base, setting, seed, workdir) for setting in settings for seed in seeds]
    missing = [run for run in runs if not run.result()]
    count = f"{len(settings)} settings × {len(seeds)} seeds = {len(runs)} runs, {len(runs) - len(missing)} finished"
    if _DRY_RUN.value:
        for run in missing:
            print(shlex.join(["python", "-m", "flax_mlm.train", *run.arguments]))
        print(count)
        return 0
    with alone(workdir) as lock:
        print(f"{count}; what each says is in its train.log", flush=True)
        return sweep(runs, Trainer(lock), workdir)


def sweep(runs: list[Run], trainer: "Trainer", workdir: Path) -> int:
    """Does what is missing, and shows after each run what is there. Returns the exit code."""
    errors: dict[str, str] = {}
    write(workdir, runs, errors)
    for number, run in enumerate(runs, 1):
        is_new = not run.result()
        code = trainer.train(run) if is_new else 0
        if code == PREEMPTED or (code and trainer.stopped):
            print("stopped by a signal. The same command goes on from there", flush=True)
            return PREEMPTED
        if result := run.result():
            outcome = f"loss {result['loss']:.4f}  accuracy {result['accuracy']:.4f}"
            outcome += f"  {result['tokens_seen']:,} tokens  {result['train_seconds']:,.1f} s"
        else:
            errors[run.name] = last_words(run, code)
            outcome = f"FAILED: {errors[run.name]}"
        print(f"{number}/{len(runs)}  {run.name}  {outcome}{'' if is_new else '  (before)'}", flush=True)
        if is_new:
            write(workdir, runs, errors)
    print(f"\n{(workdir / 'sweep.md').read_text()}\nwritten to {workdir}: sweep.md  sweep.json  sweep.png")
    return 1 if errors else 0


def make_run(base: list[str], setting: Setting, seed: int, workdir: Path) -> Run:
    """The run of a setting and a seed.

    Raises:
      UserError: the config cannot be; or there is a run in its folder already, with another one.
    """
    given = [f"--config.{path}={spell(value)}" for path, value in {**setting, "seed": seed}.items()]
    folder = workdir / grid.folder_name(setting, seed)
    try:
        config = command.resolve([*base, *given])
    except UserError as e:
        raise UserError(f"--grid: {describe(setting)}: {e}") from e
    run_config.check(folder, config, _FREE)
    return Run(setting, seed, folder, [*base, *given, f"--workdir={folder}"], config)


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[int]:
    """Makes the folder and locks it. The lock is also held by whoever inherits the descriptor, which it yields.

    Raises:
      UserError: it is locked, or cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(workdir, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"--workdir: '{workdir}' cannot be used: {e.strerror}") from e
    try:
        with contextlib.suppress(OSError):  # a file system without locks: train has a lease
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"--workdir: '{workdir}' is in use by another sweep, or by a run of one") from None
        yield descriptor
    finally:
        os.close(descriptor)


class Trainer:
    """Runs `train`. SIGTERM and SIGINT are passed on, to be answered as train does: it saves, and leaves with 75.

    Attributes:
      stopped: there was such a signal.
    """

    def __init__(self, lock: int):
        """Runs inherit the descriptor `lock`."""
        self.stopped, self._lock = False, lock
        self._process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, _: Any) -> None:
        self.stopped = True
        print(f"{signal.Signals(number).name}: the run is told; a second one has it leave at once", file=sys.stderr)
        if self._process:
            self._process.send_signal(number)

    def train(self, run: Run) -> int:
        """Trains to the end, with all that is said in WORKDIR/train.log. Returns the exit code."""
        if self.stopped:
            return PREEMPTED
        run.workdir.mkdir(exist_ok=True)
        line = [sys.executable, "-m", "flax_mlm.train", *run.arguments]
        with (run.workdir / "train.log").open("a") as log:
            print(f"$ {shlex.join(line)}", file=log, flush=True)
            self._process = process = subprocess.Popen(
                line, env=_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[self._lock],
                start_new_session=True,  # so that Ctrl-C does not reach it twice, once from here
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip
            if self.stopped:  # while there was no process to tell
                process.terminate()
            return process.wait()


def _end_with_parent() -> None:
    """Has the system send us a SIGTERM when the sweep is killed, so that a run is not left without it."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def last_words(run: Run, code: int) -> str:
    """Why a run failed, by its log."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    log = run.workdir / "train.log"
    since = re.split(r"^\$ .*\n", log.read_text(errors="replace"), flags=re.MULTILINE)[-1]  # it has all starts
    lines = [line.strip() for line in since.splitlines() if line.strip()] or ["it said nothing"]
    told = [line for line in lines if line.startswith(("error: ", "stopped: "))] or lines
    return f"{re.sub('^(error|stopped): ', '', told[-1])} (exit code {code}; {log})"


class Row(NamedTuple):
    """A setting over its seeds."""

    setting: Setting
    runs: list[dict[str, Any]]  # seed, workdir, and the numbers of its result or its error
    mean: dict[str, float]  # of each number over the finished runs; empty where there is none
    sd: dict[str, float]  # their standard deviation, that of a sample; empty where there are not two
    difference: list[float]  # of the loss to that of the first row with the same seed, for each that both have
    is_comparable: bool  # with the first one that has results
    is_best: bool  # of those that are, and have all their seeds


_NUMBERS = ("loss", "accuracy", "bits_per_byte", "tokens_seen", "train_seconds", "tokens_per_second")


def summarise(runs: list[Run], errors: dict[str, str]) -> list[Row]:
    """The rows of the table, one for each setting."""
    found: list[tuple[Setting, list[dict[str, Any]], Any]] = []
    for setting, group in itertools.groupby(runs, lambda run: run.setting):
        entries, question = list[dict[str, Any]](), None
        for run in group:
            entry: dict[str, Any] = {"seed": run.seed, "workdir": os.fspath(run.workdir)}
            if result := run.result():
                result["tokens_per_second"] = result["tokens_seen"] / result["train_seconds"]
                entry, question = (
                    entry | {name: result[name] for name in _NUMBERS if name in result},
                    asked(run.config, result),
                )
            elif run.name in errors:
                entry["error"] = errors[run.name]
            entries.append(entry)
        found.append((setting, entries, question))
    first = next((question for *_, question in found if question), None)
    base = {entry["seed"]: entry["loss"] for entry in found[0][1] if "loss" in entry}
    rows = []
    for setting, entries, question in found:
        done = [entry for entry in entries if "loss" in entry]
        numbers = {name: [entry[name] for entry in done if name in entry] for name in _NUMBERS}
        mean = {name: statistics.fmean(values) for name, values in numbers.items() if values}
        sd = {name: statistics.stdev(values) for name, values in numbers.items() if len(values) > 1}
        both = [entry["loss"] - base[entry["seed"]] for entry in done if question == first and entry["seed"] in base]
        rows.append(Row(setting, entries, mean, sd, both, bool(mean) and question == first, False))
    complete = [row for row in rows if row.is_comparable and all("loss" in entry for entry in row.runs)]
    best = min(complete, key=lambda row: row.mean["loss"]) if len(complete) > 1 else None
    return [row._replace(is_best=row is best) for row in rows]


def asked(config: Config, result: dict[str, Any]) -> Any:
    """What a held-out loss is of: which tokens, hidden how. Losses of other questions do not compare."""
    o = phases.parse_phases(config)[-1].config.objective
    # With rtd the generator sets the question, and no two runs' are the same.
    of_text = result.get("unigram_entropy"), result.get("generator_loss"), result["rows"]
    return o.name, o.masking_signature, config.eval.mask_rate, *of_text


def write(workdir: Path, runs: list[Run], errors: dict[str, str]) -> None:
    """sweep.md, sweep.json, and sweep.png where there is something to be drawn."""
    rows = summarise(runs, errors)
    files.write_text(workdir / "sweep.md", table(rows))
    files.write_json(workdir / "sweep.json", [row._asdict() for row in rows])
    plot(workdir / "sweep.png", runs)


def table(rows: list[Row]) -> str:
    """Markdown. The best loss is bold."""

    def cell(row: Row, name: str, form: str) -> str:
        if name not in row.mean:
            return "–"
        spread = f" ± {row.sd[name]:{form}}" if row.sd.get(name) else ""
        return f"{row.mean[name]:{form}}{spread}"

    def difference(row: Row) -> str:
        if row is rows[0] or not row.difference:
            return "–"
        spread = f" ± {statistics.stdev(row.difference):.4f}" if len(row.difference) > 1 else ""
        return f"{statistics.fmean(row.difference):+.4f}{spread}"

    fields, lines = list(rows[0].setting), []
    for row in rows:
        loss = cell(row, "loss", ".4f")
        done = sum("loss" in entry for entry in row.runs)
        lines.append([
            *map(spell, row.setting.values()),
            f"**{loss}**" if row.is_best else loss, difference(row), cell(row, "accuracy", ".4f"),
            cell(row, "bits_per_byte", ".3f"), cell(row, "tokens_seen", ",.0f"), cell(row, "train_seconds", ",.1f"),
            cell(row, "tokens_per_second", ",.0f"), f"{done}/{len(row.runs)}",
        ])  # fmt: skip
    header = [
        *fields, "held-out loss", "to the first", "accuracy", "bits/byte", "tokens", "seconds", "tokens/s", "seeds",
    ]  # fmt: skip
    notes = ["Mean ± standard deviation over the seeds; differences seed by seed. Seconds are those of training alone."]
    if any(row.mean and not row.is_comparable for row in rows):
        notes.append(
            "Where no difference is given, other held-out tokens were to be predicted, or they were hidden otherwise: "
            "the losses do not compare (over other vocabularies, bits per byte do)."
        )
    for row in rows:
        notes += [f"{describe(row.setting)}, seed={run['seed']}: {run['error']}" for run in row.runs if "error" in run]
    return tables.markdown(header, lines, len(fields)) + "".join(f"\n\n{note}" for note in notes) + "\n"


def shared(curves: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """What can be averaged: the lines of the same steps, and last the ends, which with a budget are not of one step."""
    before = [{line["step"]: line for line in curve[:-1]} for curve in curves]
    steps = sorted(set.intersection(*map(set, before)))
    return [[lines[step] for lines in before] for step in steps] + [[curve[-1] for curve in curves]]


def plot(file: Path, runs: list[Run]) -> None:
    """Held-out loss against tokens and against seconds: of each setting, the mean of the runs that are finished, and
    their standard deviation as a band."""
    curves: dict[str, list[list[dict[str, Any]]]] = {}
    for run in runs:
        if run.result():
            curves.setdefault(describe(run.setting), []).append(run.curve())
    if not curves:
        file.unlink(missing_ok=True)  # of other settings
        return
    with tables.figure(file, 1, 2, (11, 4.2 + 0.2 * len(curves))) as (figure, axes):
        for axis, name, label in zip(
            axes.flat, ("tokens_seen", "train_seconds"), ("tokens", "seconds of training"), strict=True
        ):
            for number, (setting, some) in enumerate(curves.items()):
                means = []
                for lines in shared(some):
                    losses = [line["loss"] for line in lines]
                    mean, sd = statistics.fmean(losses), statistics.stdev(losses) if len(losses) > 1 else 0.0
                    means.append((statistics.fmean(line[name] for line in lines), mean, mean - sd, mean + sd))
                x, y, low, high = zip(*means, strict=True)
                color = f"C{number % 10}"
                style = ("-", "--", ":", "-.")[number // 10 % 4]
                axis.plot(x, y, style, marker=".", color=color, label=setting if axis is axes.flat[0] else None)
                axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        axes.flat[0].set_ylabel("held-out loss, nats")
        figure.legend(loc="outside lower center", fontsize=8, ncols=1 + (len(curves) > 4))


if __name__ == "__main__":
    command.run(main)
