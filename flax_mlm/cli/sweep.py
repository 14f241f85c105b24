"""The settings of a sweep, its runs, and their report: sweep.md, sweep.json and sweep.png.

Settings are every combination of some values of some fields: `optimizer.name=adamw,muon; objective.mask_rate=0.15,0.3`
is four. Fields joined by & change together: `optimizer.name&optimizer.learning_rate=adamw&1e-3,muon&6e-3` is two
settings. Values that contain , ; or & are written in double quotes:
`train.phases=,"50%: objective.name=mlm, objective.mask_rate=0.3"` is two settings, the first with an empty text.
"""

import hashlib
import itertools
import math
import os
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from flax_mlm.cli import app, tables
from flax_mlm.config import phases
from flax_mlm.config.knobs import parse, spell
from flax_mlm.config.schema import Config, split
from flax_mlm.errors import UserError, as_user_error
from flax_mlm.storage import files
from flax_mlm.training import metrics, run_config

Setting = dict[str, Any]  # field -> value

# Fields that may differ from those of an earlier start: as in train, except for what changes the evaluated rows.
_FREE = ("eval.batch_size", *(name for name in run_config.FREE if name != "eval."))
_NUMBERS = {  # of a run, with their format in the table
    "loss": ".4f",
    "accuracy": ".4f",
    "bits_per_byte": ".3f",
    "tokens_seen": ",.0f",
    "train_seconds": ",.1f",
    "tokens_per_second": ",.0f",
}


def parse_grid(text: str) -> list[Setting]:
    """The settings of `--grid`: every combination, the last field changing fastest. Raises UserError."""
    if text.count('"') % 2:
        raise UserError(f"--grid: a double quote is not closed in '{text}'")
    axes, fields = list[list[Setting]](), list[str]()
    for statement in filter(None, split(text, ";")):
        names, axis = _parse_axis(statement)
        axes.append(axis)
        fields += names
    if not fields:
        raise UserError("--grid is missing; expected field=value,value; ... such as 'optimizer.name=adamw,muon'")
    if twice := [path for path in fields if fields.count(path) > 1]:
        raise UserError(f"--grid names {twice[0]} twice")
    if "seed" in fields:
        raise UserError("--grid cannot vary seed; use --seeds=3 to repeat each setting with several seeds")
    return [{path: value for part in parts for path, value in part.items()} for parts in itertools.product(*axes)]


def _parse_axis(statement: str) -> tuple[list[str], list[Setting]]:
    """One field, or several that change together, and their values."""
    left, equals, right = statement.partition("=")
    if not equals:
        raise UserError(f"--grid: '{statement}' has no values; expected field=value,value; field=value,...")
    fields = split(left, "&")
    axis: list[Setting] = []
    for item in split(right, ","):
        values = split(item, "&")
        if len(values) != len(fields):
            found = f"{len(values)} of the {len(fields)} values of {left.strip()}"
            raise UserError(f"--grid: '{item}' has {found}; separate them by &")
        with as_user_error("--grid: ", UserError):
            setting = {path: parse(path, _unquote(value)) for path, value in zip(fields, values, strict=True)}
        if setting in axis:
            raise UserError(f"--grid names {describe(setting)} twice")
        axis.append(setting)
    return fields, axis


def _unquote(text: str) -> str:
    """Removes the double quotes around a text, if there are any."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def describe(setting: Setting) -> str:
    """A setting for people, such as `optimizer.name=muon, seed=0`."""
    return ", ".join(f"{path}={spell(value)}" for path, value in setting.items())


def folder_name(setting: Setting, seed: int) -> str:
    """A folder name that shows the values, different for every setting and seed."""
    parts = [f"{path}-{spell(value)}" for path, value in sorted(setting.items())] + [f"seed-{seed}"]
    exact, plain = "+".join(parts), "+".join(re.sub(r"[^\w.-]+", "_", part, flags=re.ASCII) for part in parts)
    if plain != exact or len(plain) > 200:
        plain = f"{plain[:180]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
    return plain


class Run(NamedTuple):
    """One training."""

    setting: Setting
    seed: int
    workdir: Path
    arguments: list[str]  # of train
    config: Config
    is_moved: bool = False  # its folder has other paths, of which `train` tells whether the content is the same

    @property
    def name(self) -> str:
        return f"{describe(self.setting)}, seed={self.seed}"

    @property
    def is_finished(self) -> bool:
        return not self.is_moved and self.result() is not None

    def curve(self) -> list[dict[str, Any]]:
        """Reads the evaluations so far from metrics.jsonl."""
        return metrics.lines(self.workdir, "validation")

    def result(self) -> dict[str, Any] | None:
        """Reads the last evaluation; None for a run that is not finished, or whose loss is infinite or NaN."""
        result, last = files.read_result(self.workdir / "result.json"), self.curve()[-1:]
        if not result or not last or result.get("loss") != last[0].get("loss"):
            return None
        loss = last[0].get("loss")
        return last[0] if isinstance(loss, float) and math.isfinite(loss) else None


def make_run(base: list[str], setting: Setting, seed: int, workdir: Path) -> Run:
    """The run of a setting and a seed.

    Args:
      base: config arguments of the sweep.

    Raises:
      UserError: the config is not valid, or the run's folder holds a run with another config.
    """
    arguments = [*base, *(f"--config.{path}={spell(value)}" for path, value in (setting | {"seed": seed}).items())]
    folder = workdir / folder_name(setting, seed)
    with as_user_error(f"--grid: {describe(setting)}: ", UserError):
        config = app.config_of(arguments)
    run_config.check(folder, config, (*_FREE, *run_config.MOVABLE))
    try:
        run_config.check(folder, config, _FREE)
        is_moved = False
    except UserError:
        is_moved = True
    return Run(setting, seed, folder, [*arguments, f"--workdir={folder}"], config, is_moved)


class Row(NamedTuple):
    """A setting over its seeds."""

    setting: Setting
    runs: list[dict[str, Any]]  # seed, workdir, and the numbers of the result or the error
    mean: dict[str, float]  # of each number over the finished runs; empty if there are none
    sd: dict[str, float]  # sample standard deviations; empty for fewer than two finished runs
    difference: list[float]  # loss minus the first row's loss with the same seed
    is_comparable: bool  # its loss has the same definition as that of the first finished row
    is_best: bool  # lowest mean loss of the comparable rows whose seeds are all finished, none cut short


def summarise(runs: list[Run], errors: dict[str, str]) -> list[Row]:
    """The rows of the table, one per setting. `errors`: name of a failed run -> reason."""
    results = {run.name: None if run.name in errors else run.result() for run in runs}
    rows: list[Row] = []
    reference, first_losses = None, dict[int, float]()
    for setting, some in itertools.groupby(runs, lambda run: run.setting):
        group = list(some)
        all_entries = [_entry(run, results[run.name], errors.get(run.name)) for run in group]
        finished = [entry for entry in all_entries if "loss" in entry]
        whole = [entry for entry in finished if not tables.cut_note(entry)]
        definitions = [_loss_definition(run.config, result) for run in group if (result := results[run.name])]
        reference = reference or next(iter(definitions[-1:]), None)
        is_comparable = bool(definitions) and definitions[-1] == reference
        if not rows:
            first_losses = {entry["seed"]: entry["loss"] for entry in whole}
        numbers = {name: [entry[name] for entry in finished if name in entry] for name in _NUMBERS}
        mean = {name: statistics.fmean(values) for name, values in numbers.items() if values}
        sd = {name: statistics.stdev(values) for name, values in numbers.items() if len(values) > 1}
        shared = [entry for entry in whole if is_comparable and entry["seed"] in first_losses]
        difference = [entry["loss"] - first_losses[entry["seed"]] for entry in shared]
        rows.append(Row(setting, all_entries, mean, sd, difference, is_comparable, False))
    is_whole = [all("loss" in run and not tables.cut_note(run) for run in row.runs) for row in rows]
    complete = [row for row, whole in zip(rows, is_whole, strict=True) if row.is_comparable and whole]
    best = min(complete, key=lambda row: row.mean["loss"]) if len(complete) > 1 else None
    return [row._replace(is_best=row is best) for row in rows]


def _entry(run: Run, result: dict[str, Any] | None, error: str | None) -> dict[str, Any]:
    """A run in sweep.json."""
    entry: dict[str, Any] = {"seed": run.seed, "workdir": os.fspath(run.workdir)}
    if result:
        if result["train_seconds"]:  # not of a run of one step
            result = result | {"tokens_per_second": result["tokens_seen"] / result["train_seconds"]}
        return entry | {name: result[name] for name in (*_NUMBERS, "schedule_cut") if name in result}
    return entry | {"error": error} if error else entry


def _loss_definition(config: Config, result: dict[str, Any]) -> Any:
    """Identifies the held-out tokens and how they are masked: losses with other definitions cannot be compared."""
    o = phases.parse_phases(config)[-1].config.objective
    # With rtd the generator replaces the tokens, and each run has its own.
    text = result.get("unigram_entropy"), result.get("generator_loss"), result["rows"]
    return o.name, o.masking_signature, config.eval.mask_rate, *text


def write(workdir: Path, runs: list[Run], errors: dict[str, str]) -> None:
    """Writes sweep.md, sweep.json and, if a run is finished, sweep.png."""
    rows = summarise(runs, errors)
    files.write_text(workdir / "sweep.md", table(rows))
    files.write_json(workdir / "sweep.json", [row._asdict() for row in rows])
    plot(workdir / "sweep.png", runs)


def table(rows: list[Row]) -> str:
    """Formats the rows as Markdown, the best loss in bold."""

    def cell(values: list[float], form: str, sign: str = "") -> str:
        if not values:
            return "–"
        mean, sd = _mean_and_sd(values)
        return f"{mean:{sign}{form}}" + f" ± {sd:{form}}" * (sd > 0)

    fields, lines = list(rows[0].setting), []
    for row in rows:
        columns = {name: [run[name] for run in row.runs if name in run] for name in _NUMBERS}
        loss, *others = (cell(columns[name], form) for name, form in _NUMBERS.items())
        difference = cell([] if row is rows[0] else row.difference, ".4f", "+")
        seeds = f"{len(columns['loss'])}/{len(row.runs)}"
        loss = f"**{loss}**" if row.is_best else loss
        lines.append([*map(spell, row.setting.values()), loss, difference, *others, seeds])
    header = [*fields, "held-out loss", "vs. first", "accuracy", "bits/byte", "tokens", "seconds", "tokens/s", "seeds"]
    notes = ["Mean ± standard deviation over seeds; differences are paired by seed. Seconds count training only."]
    if any(row.mean and not row.is_comparable for row in rows):
        notes.append(
            "No difference is given where other held-out tokens are predicted or masked in another way: these losses "
            "cannot be compared (with other vocabularies, bits per byte can)."
        )
    for row in rows:
        for run in row.runs:
            if problem := run.get("error") or tables.cut_note(run):
                notes.append(f"{describe(row.setting)}, seed={run['seed']}: {problem}")
    return tables.markdown(header, lines, len(fields)) + "".join(f"\n\n{note}" for note in notes) + "\n"


def _mean_and_sd(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def aligned(curves: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Groups the evaluations of several runs by step; the last ones are one group, since runs with a time budget end at
    different steps."""
    before = [{line["step"]: line for line in curve[:-1]} for curve in curves]
    steps = sorted(set.intersection(*map(set, before)))
    return [[lines[step] for lines in before] for step in steps] + [[curve[-1] for curve in curves]]


def plot(file: Path, runs: list[Run]) -> None:
    """Plots held-out loss against tokens and seconds: each setting's mean over its finished runs, with the standard
    deviation as a band."""
    finished = itertools.groupby([run for run in runs if run.result()], lambda run: describe(run.setting))
    curves = {setting: [run.curve() for run in group] for setting, group in finished}
    if not curves:
        file.unlink(missing_ok=True)  # a plot of other settings
        return
    columns = (("tokens_seen", "tokens"), ("train_seconds", "seconds of training"))
    with tables.figure(file, 1, 2, (11, 4.2 + 0.2 * len(curves))) as (figure, axes):
        for axis, (name, label) in zip(axes.flat, columns, strict=True):
            for number, (setting, of_setting) in enumerate(curves.items()):
                points = []
                for lines in aligned(of_setting):
                    mean, sd = _mean_and_sd([line["loss"] for line in lines])
                    points.append((statistics.fmean(line[name] for line in lines), mean, mean - sd, mean + sd))
                x, y, low, high = zip(*points, strict=True)
                style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}
                axis.plot(x, y, marker=".", label=setting if axis is axes.flat[0] else None, **style)
                axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        axes.flat[0].set_ylabel("held-out loss, nats")
        figure.legend(loc="outside lower center", fontsize=8, ncols=1 + (len(curves) > 4))
