"""Evaluates checkpoints on tasks: one table, with differences and their confidence intervals.

python -m flax_mlm.compare --checkpoints=masked=runs/mlm,causal=runs/clm --output=compared \\
    --tasks='mlm; cloze; blimp=minimal_pairs --data=blimp/; cola=classification --train=cola.tsv --metric=matthews'

Each pair is a `python -m flax_mlm.evaluate` process with the overrides given here and those of the task. Its result is
a file in --output; results for the same checkpoint, options and files are reused. Differences to the first checkpoint
have 95% confidence intervals from a paired bootstrap over the examples of both.
"""

import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from flax_mlm.cli import app, tables
from flax_mlm.config.schema import Config, split, split_paths
from flax_mlm.errors import Failure, UserError, as_user_error
from flax_mlm.storage import files

_CHECKPOINTS_HELP = (
    "workdirs, checkpoints, Hugging Face folders or hf:ORG/NAME, comma-separated; NAME=PATH sets a column's name"
)
_CHECKPOINTS = flags.DEFINE_string("checkpoints", "", _CHECKPOINTS_HELP)
_TASKS_HELP = "tasks of evaluate with their options, separated by `;`; NAME=TASK ... sets a row's name"
_TASKS = flags.DEFINE_string("tasks", "mlm; cloze", _TASKS_HELP)
flags.DEFINE_string("output", "", "folder for the results, table.md, comparison.json and plot.png")
_DRAWS = flags.DEFINE_integer("draws", 1000, "number of bootstrap resamples", 10)


def main(config: Config) -> None:
    paths, overrides = parse_checkpoints(_CHECKPOINTS.value), app.config_arguments(sys.argv)
    if overrides and overrides[0].startswith("--config="):
        raise UserError(f"{overrides[0]} is not used, checkpoints have configs; use --config.section.field=value")
    tasks = parse_tasks(_TASKS.value)
    output = app.required_folder("output", "name a folder for the results")
    checkpoints = {name: find(path) for name, path in paths.items()}
    rows: list[Row] = []
    for task, options in tasks.items():
        arguments = [*overrides, *options]  # the task's own win
        results = {name: result_of(task, arguments, name, *found, output) for name, found in checkpoints.items()}
        rows += compared(task, results, _DRAWS.value)
    text = table(list(checkpoints), rows) + "".join(f"\n{name}: {note}\n" for name, note in cut_notes(paths).items())
    files.write_text(output / "table.md", text)
    files.write_json(output / "comparison.json", [row._asdict() for row in rows])
    plot(output / "plot.png", list(checkpoints), rows)
    print(f"\n{text}\nwritten to {output}: table.md  plot.png  comparison.json  results/")


def parse_checkpoints(text: str) -> dict[str, str]:
    """Parses `--checkpoints`, a list of `PATH` or `NAME=PATH`: name -> path. Raises UserError."""

    def exists(path: str) -> bool:
        return any(os.path.exists(os.path.expanduser(p)) for p in (path, re.sub(r"@[0-9]+$", "", path)))

    def parts(item: str) -> tuple[str, str]:
        if exists(item) or item.startswith(("gs://", "hf:")):
            return "", item
        places = (match.start() for match in re.finditer("=", item))
        splits = [(item[:i], item[i + 1 :]) for i in places]
        return next((pair for pair in splits if exists(pair[1])), splits[0] if splits else ("", item))

    def is_whole(item: str) -> bool:
        name, path = parts(item)
        return "," not in name and exists(path)

    paths: dict[str, str] = {}
    for item in filter(None, split_paths(text, is_whole)):
        name, path = parts(item)
        name = name or Path(path.rstrip("/")).name
        if name in paths:
            raise UserError(f"--checkpoints names two '{name}'; rename one with NAME=PATH")
        paths[name] = path
    if not paths:
        raise UserError("--checkpoints is missing; expected paths, comma-separated")
    return paths


def parse_tasks(text: str) -> dict[str, list[str]]:
    """Parses `--tasks`: name -> arguments of evaluate. Raises UserError."""
    tasks: dict[str, list[str]] = {}
    for statement in filter(None, split(text, ";")):
        with as_user_error(f"--tasks: cannot parse '{statement}': ", ValueError):
            first, *arguments = shlex.split(statement)
        name, _, task = first.rpartition("=")
        name = name or task
        if any(re.match(r"--(checkpoint|json|task|save)\b", argument) for argument in arguments):
            raise UserError(f"--tasks: '{statement}' has --checkpoint, --json, --task or --save, which compare sets")
        if name in tasks:
            raise UserError(f"--tasks names two '{name}'; rename one with NAME={task} ...")
        tasks[name] = [f"--task={task}", *arguments]
    if not tasks:
        raise UserError("--tasks is empty; expected tasks of evaluate, such as 'mlm; cloze'")
    return tasks


def find(path: str) -> tuple[str, str]:
    """Finds the newest sound checkpoint of a run, or a Hugging Face folder: its path and SHA-256. Raises UserError."""
    from flax_mlm.checkpoint.format import newest_meta
    from flax_mlm.hf.folder import is_hf_folder
    from flax_mlm.storage import hub

    if not is_hf_folder(path):
        newest, meta = newest_meta(path)
        return os.fspath(newest), meta["sha256"]
    path = hub.pin("--checkpoints", path)
    digest, root = hashlib.sha256(), Path(hub.local("--checkpoints", path)).expanduser()
    for file in sorted([*root.glob("*"), *root.glob("*/config.json")]):
        if file.suffix in (".json", ".model", ".safetensors", ".txt") and file.is_file():
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return path, digest.hexdigest()


def result_of(task: str, arguments: list[str], name: str, path: str, sha256: str, output: Path) -> dict[str, Any]:
    """Reads the result of an earlier evaluation of a checkpoint, or evaluates it.

    Raises:
      UserError: evaluate ended with a user error, or `output` cannot be written.
      Failure: evaluate failed.
    """
    print(f"{task}: {name}", flush=True)
    key = files.digest([path, sha256, *arguments, *files_in(arguments)])[:12]
    file = output / "results" / f"{task}-{name}-{key}.json"
    result = files.read_result(file)
    if result is None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--output: '{output}' cannot be used: {e.strerror}") from e
        line = [sys.executable, "-m", "flax_mlm.evaluate", f"--checkpoint={path}", *arguments, f"--json={file}"]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            message = (done.stderr.strip().splitlines() or ["no output"])[-1]
            error = UserError if done.returncode == 2 else Failure
            raise error(f"{task} of {name}: {message.removeprefix('error: ')}")
        result = files.read_json(file)
    return result


def files_in(arguments: list[str]) -> list[tuple[str, int, int]]:
    """Name, size and modification time of every file named by an option's value."""
    result = []
    for path in (Path(value).expanduser() for argument in arguments if (value := argument.partition("=")[2])):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                result.append((file.name, file.stat().st_size, file.stat().st_mtime_ns))
    return result


class Row(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str
    higher_is_better: bool
    values: dict[str, tuple[float, float]]  # checkpoint -> value and standard error
    # checkpoint -> difference to the first with the same examples, lower and upper end of its 95% confidence interval
    differences: dict[str, tuple[float, float, float]]


def compared(task: str, results: dict[str, dict[str, Any]], draws: int) -> list[Row]:
    """The rows of a task, one per metric of its results, with differences from `draws` bootstrap resamples."""
    import numpy as np

    from flax_mlm.evaluation.registry import headline_metric

    headlines = {name: headline_metric(result) for name, result in results.items()}
    rows: dict[str, Row] = {}
    for name, headline in headlines.items():
        row = rows.setdefault(headline.metric, Row(task, headline.metric, headline.higher_is_better, {}, {}))
        row.values[name] = headline.value, headline.stderr
    for row in rows.values():
        first, *others = row.values
        reference = headlines[first]
        for name in others:
            if (other := headlines[name]).examples == reference.examples:
                rng, size = np.random.default_rng(0), reference.num_examples
                picks = (rng.integers(0, size, size) for _ in range(draws))
                low, high = np.percentile([other.resample(i) - reference.resample(i) for i in picks], [2.5, 97.5])
                row.differences[name] = other.value - reference.value, float(low), float(high)
    return list(rows.values())


def table(checkpoints: list[str], rows: list[Row]) -> str:
    """Formats the rows as Markdown; differences whose interval excludes 0 are bold."""

    def cell(row: Row, name: str) -> str:
        if name not in row.values:
            return "–"
        value, stderr = row.values[name]
        text = f"{value:.4f} ± {stderr:.4f}"
        if name in row.differences:
            difference, low, high = row.differences[name]
            bold = "**" if low > 0 or high < 0 else ""
            text += f"<br>{bold}{difference:+.4f}{bold} [{low:+.4f}, {high:+.4f}]"
        return text

    lines = []
    for row in rows:
        arrow = "↑" if row.higher_is_better else "↓"
        lines.append([row.task, f"{row.metric} {arrow}", *(cell(row, name) for name in checkpoints)])
    note = "± standard error. Below: the difference to the row's first value with its 95% interval (paired bootstrap)."
    return tables.markdown(["task", "metric", *checkpoints], lines, text_columns=2) + f"\n\n{note}\n"


def cut_notes(paths: dict[str, str]) -> dict[str, str]:
    """Notes on the checkpoints of runs whose time budget has cut their schedule, by name."""
    from flax_mlm.checkpoint.format import newest_meta
    from flax_mlm.hf.folder import is_hf_folder

    notes = {name: tables.cut_note(newest_meta(path)[1]) for name, path in paths.items() if not is_hf_folder(path)}
    return {name: note for name, note in notes.items() if note}


def plot(file: Path, checkpoints: list[str], rows: list[Row]) -> None:
    """Plots a panel per row: values with standard errors."""
    columns = min(len(rows), 4)
    height = -(-len(rows) // columns)
    size = 3.2 * columns, 0.8 + (0.9 + 0.3 * len(checkpoints)) * height
    with tables.figure(file, height, columns, size) as (_, axes):
        for axis in axes.flat[len(rows) :]:
            axis.axis("off")
        for axis, row in zip(axes.flat, rows, strict=False):
            for y, name in enumerate(checkpoints):
                if name in row.values:
                    value, stderr = row.values[name]
                    axis.errorbar(value, y, xerr=stderr, fmt="o", capsize=3, color=f"C{y}")
            axis.set_yticks(range(len(checkpoints)), checkpoints)
            axis.set_ylim(len(checkpoints) - 0.5, -0.5)
            better = "higher" if row.higher_is_better else "lower"
            axis.set_title(f"{row.task}: {row.metric} ({better} is better)", size=8)
            axis.tick_params(labelsize=8)
            axis.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    app.run(main)
