"""Trains a config once for each setting of a grid and each seed, and makes a table and a plot.

    python -m flax_mlm.sweep --config=quickstart --workdir=runs/sweep --seeds=3 \\
        --grid='optimizer.name=adamw,muon; objective.mask_rate=0.15,0.3'

Each training is a `python -m flax_mlm.train` process with its own folder in --workdir; they run one after another. The
same command continues after a kill, and with more settings or seeds it runs only the missing ones.
docs/how-to/ablations.md explains --grid.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from flax_mlm.cli import app, sweep
from flax_mlm.config.schema import Config
from flax_mlm.distributed import preemption
from flax_mlm.errors import PREEMPTED, UserError, as_failure

_GRID_HELP = "all combinations of field=value,value; field=value,...; a&b=1&2,3&4 changes two fields together"
_GRID = flags.DEFINE_string("grid", "", _GRID_HELP)
_SEEDS = flags.DEFINE_integer("seeds", 1, "runs per setting, with seeds from config.seed on", lower_bound=1)
flags.DEFINE_string("workdir", "", "folder of the runs, sweep.md, sweep.json and sweep.png")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the training commands and run none")

# The environment before environment.prepare changes it for the base config: each run prepares its own.
_ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}
_LOG = "train.log"  # the output of all starts of a run
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # <sys/prctl.h>


def main(config: Config) -> int:
    settings = sweep.parse_grid(_GRID.value)
    workdir = app.required_folder("workdir", "name a folder for the runs, such as --workdir=runs/sweep")
    seeds = range(config.seed, config.seed + _SEEDS.value)
    base = app.config_arguments(sys.argv)
    runs = [sweep.make_run(base, setting, seed, workdir) for setting in settings for seed in seeds]
    missing = [run for run in runs if not run.is_finished]
    count = f"{len(settings)} settings × {len(seeds)} seeds = {len(runs)} runs, {len(runs) - len(missing)} finished"
    if _DRY_RUN.value:
        for run in missing:
            print(shlex.join(["python", "-m", "flax_mlm.train", *run.arguments]))
        print(count)
        return 0
    trainer = Trainer(lock_folder(workdir))
    print(f"{count}; each run's output goes to its train.log", flush=True)
    return run_all(runs, trainer, workdir)


def lock_folder(folder: Path) -> int:
    """Makes a folder and locks it, until this process and all that inherit the returned descriptor have ended.

    Raises:
      UserError: the folder is locked, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"--workdir: '{folder}' cannot be used: {e.strerror}") from e
    with contextlib.suppress(OSError):  # a file system without locks; train has a lease
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--workdir: '{folder}' is in use by another sweep, or by a run of one") from None
    return descriptor


class Trainer:
    """Runs `train` in a subprocess and passes SIGTERM, SIGINT and SIGHUP on to it: it saves, and exits with 75.

    Attributes:
      stopped: True after such a signal.
    """

    def __init__(self, lock: int):
        """Handles the signals; runs inherit the descriptor `lock`."""
        self.stopped, self._lock = False, lock
        self._process: subprocess.Popen[bytes] | None = None
        for number in preemption.stop_signals():
            signal.signal(number, self._stop)

    def _stop(self, number: int, _: Any) -> None:
        self.stopped = True
        name = signal.Signals(number).name
        print(f"{name}: the run saves and stops; a second signal stops it at once", file=sys.stderr)
        if self._process:
            self._process.send_signal(number)

    def train(self, workdir: Path, arguments: list[str]) -> int:
        """Trains to the end, with the output in WORKDIR/train.log. Returns the exit code."""
        if self.stopped:
            return PREEMPTED
        workdir.mkdir(exist_ok=True)
        line = [sys.executable, "-m", "flax_mlm.train", *arguments]
        with (workdir / _LOG).open("ab", buffering=0) as log:
            with contextlib.suppress(OSError):  # a full disk: the log may lose lines
                log.write(f"$ {shlex.join(line)}\n".encode())
            self._process = process = subprocess.Popen(
                line, env=_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[self._lock],
                start_new_session=True,  # otherwise Ctrl-C reaches it twice
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip
            if self.stopped:  # the signal came before there was a process
                process.terminate()
            return process.wait()


def _end_with_parent() -> None:
    """Asks Linux to send this process SIGTERM when the sweep is killed."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def run_all(runs: list[sweep.Run], trainer: Trainer, workdir: Path) -> int:
    """Trains what is not finished, and writes the report after each run. Returns the exit code."""
    errors: dict[str, str] = {}
    unwritable = f"--workdir: the report in '{workdir}' cannot be written"
    with as_failure(unwritable):
        sweep.write(workdir, runs, errors)
    for number, run in enumerate(runs, 1):
        is_new = not run.is_finished
        code = trainer.train(run.workdir, run.arguments) if is_new else 0
        if code == PREEMPTED or (code and trainer.stopped):
            print("stopped by a signal; run the same command again to continue", flush=True)
            return PREEMPTED
        if not code and (result := run.result()):
            outcome = f"loss {result['loss']:.4f}  accuracy {result['accuracy']:.4f}"
            outcome += f"  {result['tokens_seen']:,} tokens  {result['train_seconds']:,.1f} s"
        else:
            errors[run.name] = failure_reason(run.workdir, code)
            outcome = f"FAILED: {errors[run.name]}"
        print(f"{number}/{len(runs)}  {run.name}  {outcome}{'' if is_new else '  (before)'}", flush=True)
        if is_new:
            with as_failure(unwritable):
                sweep.write(workdir, runs, errors)
    print(f"\n{(workdir / 'sweep.md').read_text()}\nwritten to {workdir}: sweep.md  sweep.json  sweep.png")
    return 1 if errors else 0


def failure_reason(workdir: Path, code: int) -> str:
    """The signal that ended a run, or the error message in its log."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    log = workdir / _LOG
    last_start = re.split(r"^\$ .*\n", log.read_text(errors="replace"), flags=re.MULTILINE)[-1]
    lines = [line.strip() for line in last_start.splitlines() if line.strip()] or ["no output"]
    messages = [line for line in lines if line.startswith(("error: ", "stopped: "))] or lines
    return f"{re.sub('^(error|stopped): ', '', messages[-1])} (exit code {code}; {log})"


if __name__ == "__main__":
    app.run(main, prints_log=True)
