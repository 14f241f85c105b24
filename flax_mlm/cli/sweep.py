"""The runs of a sweep, and their report: sweep.md, sweep.json and sweep.png."""

import itertools
import json
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from flax_mlm.cli import tables
from flax_mlm.cli.arguments import config_of
from flax_mlm.cli.grid import Setting, describe, folder_name, spell
from flax_mlm.config import phases
from flax_mlm.config.schema import Config
from flax_mlm.errors import UserError
from flax_mlm.storage import files
from flax_mlm.training import metrics, run_config

# Fields that may differ from those of an earlier start: as in train, except for what changes the evaluated rows.
_FREE = ("eval.batch_size", *(name for name in run_config.FREE if name != "eval."))
_NUMBERS = ("loss", "accuracy", "bits_per_byte", "tokens_seen", "train_seconds", "tokens_per_second")


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
        """Reads the evaluations so far from metrics.jsonl."""
        return metrics.lines(self.workdir, "validation")

    def result(self) -> dict[str, Any] | None:
        """Reads the last evaluation; None for a run that is not finished."""
        file, last = self.workdir / "result.json", self.curve()[-1:]
        is_finished = last and file.exists() and json.loads(file.read_text())["loss"] == last[0]["loss"]
        return last[0] if is_finished else None


def make_run(base: list[str], setting: Setting, seed: int, workdir: Path) -> Run:
    """The run of a setting and a seed.

    Args:
      base: config arguments of the sweep.

    Raises:
      UserError: the config is not valid, or the run's folder holds a run with another config.
    """
    values = {**setting, "seed": seed}
    arguments = [*base, *(f"--config.{path}={spell(value)}" for path, value in values.items())]
    folder = workdir / folder_name(setting, seed)
    try:
        config = config_of(arguments)
    except UserError as e:
        raise UserError(f"--grid: {describe(setting)}: {e}") from e
    run_config.check(folder, config, _FREE)
    return Run(setting, seed, folder, [*arguments, f"--workdir={folder}"], config)


class Row(NamedTuple):
    """A setting over its seeds."""

    setting: Setting
    runs: list[dict[str, Any]]  # seed, workdir, and the numbers of the result or the error
    mean: dict[str, float]  # of each number over the finished runs; empty if there are none
    sd: dict[str, float]  # sample standard deviations; empty for fewer than two finished runs
    difference: list[float]  # loss minus the first row's loss with the same seed
    is_comparable: bool  # its loss has the same definition as that of the first finished row
    is_best: bool  # lowest mean loss of the comparable rows whose seeds are all finished


def summarise(runs: list[Run], errors: dict[str, str]) -> list[Row]:
    """The rows of the table, one per setting. `errors`: name of a failed run -> reason."""
    settings = [(setting, list(group)) for setting, group in itertools.groupby(runs, lambda run: run.setting)]
    entries = {run.name: _entry(run, errors.get(run.name)) for run in runs}
    definitions = [_loss_definition(group) for _, group in settings]
    reference = next(filter(None, definitions), None)
    first_losses = {run.seed: entries[run.name].get("loss") for run in settings[0][1]}
    rows = []
    for (setting, group), definition in zip(settings, definitions, strict=True):
        all_entries = [entries[run.name] for run in group]
        finished = [entry for entry in all_entries if "loss" in entry]
        numbers = {name: [entry[name] for entry in finished if name in entry] for name in _NUMBERS}
        mean = {name: statistics.fmean(values) for name, values in numbers.items() if values}
        sd = {name: statistics.stdev(values) for name, values in numbers.items() if len(values) > 1}
        is_comparable = bool(mean) and definition == reference
        pairs = [(entry["loss"], first_losses.get(entry["seed"])) for entry in finished if is_comparable]
        difference = [loss - first for loss, first in pairs if first is not None]
        rows.append(Row(setting, all_entries, mean, sd, difference, is_comparable, False))
    complete = [row for row in rows if row.is_comparable and all("loss" in entry for entry in row.runs)]
    best = min(complete, key=lambda row: row.mean["loss"]) if len(complete) > 1 else None
    return [row._replace(is_best=row is best) for row in rows]


def _entry(run: Run, error: str | None) -> dict[str, Any]:
    """A run in sweep.json."""
    entry: dict[str, Any] = {"seed": run.seed, "workdir": os.fspath(run.workdir)}
    if result := run.result():
        result["tokens_per_second"] = result["tokens_seen"] / result["train_seconds"]
        return entry | {name: result[name] for name in _NUMBERS if name in result}
    return entry | {"error": error} if error else entry


def _loss_definition(runs: list[Run]) -> Any:
    """Identifies the held-out tokens and how they are masked: losses with other definitions cannot be compared. None
    if no run is finished."""
    results = [(run.config, result) for run in runs if (result := run.result())]
    if not results:
        return None
    config, result = results[-1]
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
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.fmean(values):{sign}{form}}" + f" ± {sd:{form}}" * (sd > 0)

    fields, lines = list(rows[0].setting), []
    for row in rows:
        columns = {name: [run[name] for run in row.runs if name in run] for name in _NUMBERS}
        loss = cell(columns["loss"], ".4f")
        lines.append([
            *map(spell, row.setting.values()),
            f"**{loss}**" if row.is_best else loss, cell([] if row is rows[0] else row.difference, ".4f", "+"),
            cell(columns["accuracy"], ".4f"), cell(columns["bits_per_byte"], ".3f"),
            cell(columns["tokens_seen"], ",.0f"), cell(columns["train_seconds"], ",.1f"),
            cell(columns["tokens_per_second"], ",.0f"), f"{len(columns['loss'])}/{len(row.runs)}",
        ])  # fmt: skip
    header = [
        *fields, "held-out loss", "vs. first", "accuracy", "bits/byte", "tokens", "seconds", "tokens/s", "seeds",
    ]  # fmt: skip
    notes = ["Mean ± standard deviation over seeds; differences are paired by seed. Seconds count training only."]
    if any(row.mean and not row.is_comparable for row in rows):
        notes.append(
            "No difference is given where other held-out tokens are predicted or masked in another way: these losses "
            "cannot be compared (with other vocabularies, bits per byte can)."
        )
    for row in rows:
        notes += [f"{describe(row.setting)}, seed={run['seed']}: {run['error']}" for run in row.runs if "error" in run]
    return tables.markdown(header, lines, len(fields)) + "".join(f"\n\n{note}" for note in notes) + "\n"


def aligned(curves: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Groups the evaluations of several runs by step; the last ones are one group, since runs with a time budget end at
    different steps."""
    before = [{line["step"]: line for line in curve[:-1]} for curve in curves]
    steps = sorted(set.intersection(*map(set, before)))
    return [[lines[step] for lines in before] for step in steps] + [[curve[-1] for curve in curves]]


def plot(file: Path, runs: list[Run]) -> None:
    """Plots held-out loss against tokens and seconds: each setting's mean over its finished runs, with the standard
    deviation as a band."""
    curves: dict[str, list[list[dict[str, Any]]]] = {}
    for run in runs:
        if run.result():
            curves.setdefault(describe(run.setting), []).append(run.curve())
    if not curves:
        file.unlink(missing_ok=True)  # a plot of other settings
        return
    columns = (("tokens_seen", "tokens"), ("train_seconds", "seconds of training"))
    with tables.figure(file, 1, 2, (11, 4.2 + 0.2 * len(curves))) as (figure, axes):
        for axis, (name, label) in zip(axes.flat, columns, strict=True):
            for number, (setting, of_setting) in enumerate(curves.items()):
                points = []
                for lines in aligned(of_setting):
                    losses = [line["loss"] for line in lines]
                    mean, sd = statistics.fmean(losses), statistics.stdev(losses) if len(losses) > 1 else 0.0
                    points.append((statistics.fmean(line[name] for line in lines), mean, mean - sd, mean + sd))
                x, y, low, high = zip(*points, strict=True)
                style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}
                axis.plot(x, y, marker=".", label=setting if axis is axes.flat[0] else None, **style)
                axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        axes.flat[0].set_ylabel("held-out loss, nats")
        figure.legend(loc="outside lower center", fontsize=8, ncols=1 + (len(curves) > 4))
