"""Command: a config × a grid of settings × seeds -> one training for each, a table and a plot.

    python -m flax_mlm.sweep --config=configs/quickstart.py --workdir=runs/sweep --seeds=3 \\
        --grid='optimizer.name=adamw,muon; objective.mask_rate=0.15,0.3'

Each training is a `python -m flax_mlm.train` process with its own folder in --workdir; they run one after another. The
same command continues after a kill, and with more settings or seeds it runs only the missing ones. cli/grid.py explains
--grid.
"""

import shlex
import sys
from pathlib import Path

from absl import flags

from flax_mlm.cli import app
from flax_mlm.cli.arguments import config_arguments
from flax_mlm.cli.grid import parse_grid
from flax_mlm.cli.sweep import Run, make_run, write
from flax_mlm.cli.trainer import Trainer, failure_reason, lock_folder
from flax_mlm.config.schema import Config
from flax_mlm.errors import PREEMPTED, UserError
from flax_mlm.storage import gcs

_GRID = flags.DEFINE_string(
    "grid", "", "all combinations of field=value,value; field=value,...; a&b=1&2,3&4 changes two fields together"
)
_SEEDS = flags.DEFINE_integer("seeds", 1, "runs per setting, with seeds from config.seed on", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "", "folder of the runs, sweep.md, sweep.json and sweep.png")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the training commands and run none")


def main(config: Config) -> int:
    settings = parse_grid(_GRID.value)
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name a folder for the runs, such as --workdir=runs/sweep")
    gcs.refuse("--workdir", _WORKDIR.value)
    workdir = Path(_WORKDIR.value).expanduser()
    seeds = range(config.seed, config.seed + _SEEDS.value)
    base = config_arguments(sys.argv)
    runs = [make_run(base, setting, seed, workdir) for setting in settings for seed in seeds]
    missing = [run for run in runs if not run.result()]
    count = f"{len(settings)} settings × {len(seeds)} seeds = {len(runs)} runs, {len(runs) - len(missing)} finished"
    if _DRY_RUN.value:
        for run in missing:
            print(shlex.join(["python", "-m", "flax_mlm.train", *run.arguments]))
        print(count)
        return 0
    with lock_folder(workdir) as lock:
        print(f"{count}; each run's output goes to its train.log", flush=True)
        return run_all(runs, Trainer(lock), workdir)


def run_all(runs: list[Run], trainer: Trainer, workdir: Path) -> int:
    """Trains what is not finished, and writes the report after each run. Returns the exit code."""
    errors: dict[str, str] = {}
    write(workdir, runs, errors)
    for number, run in enumerate(runs, 1):
        is_new = not run.result()
        code = trainer.train(run.workdir, run.arguments) if is_new else 0
        if code == PREEMPTED or (code and trainer.stopped):
            print("stopped by a signal; run the same command again to continue", flush=True)
            return PREEMPTED
        if result := run.result():
            outcome = f"loss {result['loss']:.4f}  accuracy {result['accuracy']:.4f}"
            outcome += f"  {result['tokens_seen']:,} tokens  {result['train_seconds']:,.1f} s"
        else:
            errors[run.name] = failure_reason(run.workdir, code)
            outcome = f"FAILED: {errors[run.name]}"
        print(f"{number}/{len(runs)}  {run.name}  {outcome}{'' if is_new else '  (before)'}", flush=True)
        if is_new:
            write(workdir, runs, errors)
    print(f"\n{(workdir / 'sweep.md').read_text()}\nwritten to {workdir}: sweep.md  sweep.json  sweep.png")
    return 1 if errors else 0


if __name__ == "__main__":
    app.run(main)
