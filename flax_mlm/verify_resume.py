"""Checks that a run ends the same after kills, and after moves to other devices.

    python -m flax_mlm.verify_resume --config=quickstart
    python -m flax_mlm.verify_resume --config=quickstart --config.train.reproducible=True --shapes=1x8,2x4

It trains a few steps of the config several times, in separate processes: without interruption; killed (SIGKILL) and
restarted; continued on other numbers of processes and devices; and killed and moved from each of these to the next.
Then it compares what the runs wrote, bit for bit, and exits with 1 if a guarantee does not hold:

  - on the same devices everything is equal;
  - on other devices the batches and masks are equal, and with train.reproducible everything is.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from flax_mlm.cli import app
from flax_mlm.config import phases
from flax_mlm.config.schema import LENGTHS, Config
from flax_mlm.errors import Failure, UserError, as_user_error
from flax_mlm.storage import files, gcs
from flax_mlm.training import metrics

_STEPS = flags.DEFINE_integer("steps", 30, "steps of each run", lower_bound=6)
_KILLS = flags.DEFINE_integer("kills", 2, "how often the interrupted run receives SIGKILL", lower_bound=1)
_SHAPES = flags.DEFINE_string("shapes", "1x4,2x2", "PROCESSESxDEVICES to move to, on CPUs only; empty: no moves")
_WORKDIR = flags.DEFINE_string("workdir", "", "folder to keep the runs in; default: a temporary folder")

_PARTS = ("batches", "parameters", "state", "metrics", "result")  # of what a run writes
_TIMES = ("tokens_per_second", "data_wait", "eta_seconds", "mfu", "train_seconds")
_BATCHES = ("step", "rows", "batch_fingerprint", "mask_rate", "tokens", "predicted_tokens")


class Shape(NamedTuple):
    """Processes, and devices of each; None: those of this machine."""

    processes: int = 1
    devices: int | None = None

    def __str__(self) -> str:
        return "here" if self.devices is None else f"{self.processes}x{self.devices}"


def main(config: Config) -> int:
    steps = _STEPS.value
    if _KILLS.value >= steps:
        raise UserError(f"--kills is {_KILLS.value}; expected less than --steps, {steps}")
    shapes = parse_shapes(_SHAPES.value)
    if shapes and backend() != "cpu":
        print("no moves: only CPUs can simulate other numbers of devices; set JAX_PLATFORMS=cpu to test moves")
        shapes = []
    every = max(2, steps // 3)
    arguments = [*app.config_arguments(sys.argv), *shortened(config, steps, every)]
    with as_user_error(f"--steps is {steps}, which may be too few: ", UserError):
        app.config_of(arguments)
    here = Shape()
    found: dict[str, list[str]] = {}
    broken: list[str] = []
    with folder_of_runs() as name:
        folder = Path(name)

        def run(name: str, *legs: tuple[Shape, int | None], exact: bool = True) -> None:
            """Trains in some places in turn, and compares the run with `straight`."""
            for shape, kill_at in legs:
                train(arguments, folder / name, shape, kill_at)
            found[name] = hashes(folder / name, steps)
            print_row(name, " > ".join(str(shape) for shape, _ in legs), *found[name])
            pairs = zip(_PARTS, found[name], found["straight"], strict=True)
            wrong = [part for part, own, other in pairs if own != other and (exact or part == "batches")]
            if wrong:
                broken.append(f"run '{name}' differs from 'straight' in its {', '.join(wrong)}")

        print_row("run", "devices", *_PARTS)
        run("straight", (here, None))
        run("killed", *((here, stop) for stop in stops(steps, _KILLS.value)), (here, None))
        exact = config.train.reproducible
        for shape in shapes:
            copy_checkpoint(folder / "straight", folder / f"to {shape}", every)
            run(f"to {shape}", (shape, None), exact=exact)
        if len(shapes) > 1:
            run("moving", *zip(shapes, stops(steps, len(shapes)), strict=True), (here, None), exact=exact)
    if broken:
        raise Failure("; ".join(broken))
    print("all guarantees hold: what must be equal is equal, bit for bit")
    if shapes and not exact:
        print("with train.reproducible the parameters are equal, too, on all devices that train.batch_groups allows")
    return 0


def shortened(config: Config, steps: int, every: int) -> list[str]:
    """Arguments for a run of `steps` steps that logs each step, and evaluates and saves every `every` steps."""
    o = config.optimizer
    values: dict[str, Any] = {f"train.{name}": 0.0 for name in LENGTHS}
    values |= {"train.steps": steps, "train.phases": phases.in_fractions(phases.parse_phases(config))}
    values |= {"train.log_every": 1, "train.eval_every": every, "train.checkpoint_every": every, "train.max_to_keep": 9}
    values["train.keep_period"] = 0  # all are kept
    values |= {"eval.max_rows": config.eval.max_rows or 2 * config.eval.batch_size}
    values |= {"optimizer.lawa_every": min(o.lawa_every, max(1, (steps - 1) // o.lawa_count))}
    values |= {"log.tensorboard": False, "log.wandb_project": ""}
    return [f"--config.{path}={value}" for path, value in values.items()]


def print_row(name: str, devices: str, *hashes: str) -> None:
    print("  ".join([f"{name:12}", f"{devices:24}", *(f"{x:12}" for x in hashes)]), flush=True)


def stops(steps: int, count: int) -> list[int]:
    """Some steps between the first and the last, evenly spread."""
    return [steps * (i + 1) // (count + 1) for i in range(count)]


def parse_shapes(text: str) -> list[Shape]:
    """Parses "1x4,2x2". Raises UserError."""
    items = [item.strip() for item in text.split(",") if item]
    if not all(re.fullmatch(r"0*[1-9]\d*x0*[1-9]\d*", item) for item in items):
        raise UserError(f"--shapes is '{text}'; expected PROCESSESxDEVICES, comma-separated, such as 1x4,2x2")
    return [Shape(*map(int, item.split("x"))) for item in items]


def backend() -> str:
    """The default backend of JAX. A subprocess asks for it, because an accelerator serves one process at a time."""
    code = "from flax_mlm.distributed import environment; environment.prepare(); import jax; "
    code += "print(jax.default_backend())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


def folder_of_runs() -> contextlib.AbstractContextManager[str]:
    """Makes `--workdir`, or a temporary folder for the block. Raises UserError."""
    if not _WORKDIR.value:
        return tempfile.TemporaryDirectory(prefix="verify_resume-")
    folder = gcs.local("--workdir", _WORKDIR.value).absolute()
    try:
        folder.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"--workdir: '{folder}' cannot be made ({e.strerror}); name a new folder") from e
    return contextlib.nullcontext(str(folder))


def copy_checkpoint(source: Path, workdir: Path, step: int) -> None:
    """Copies a run as it was after saving `step`."""
    shutil.copytree(source / "checkpoints" / str(step), workdir / "checkpoints" / str(step))
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(source / name, workdir / name)


def train(arguments: list[str], workdir: Path, shape: Shape, kill_at: int | None) -> None:
    """Runs `train` to its end, or kills it after step `kill_at`. Raises Failure."""
    line = [sys.executable, "-m", "flax_mlm.train", *arguments, f"--workdir={workdir}"]
    env = dict(os.environ)
    with socket.socket() as probe:  # finds a free port
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    if shape.devices is not None:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={shape.devices}"
        env["JAX_PLATFORMS"] = "cpu"
    with contextlib.ExitStack() as at_exit:
        log = at_exit.enter_context((workdir.parent / f"{workdir.name}.log").open("a+"))
        processes = []
        for i in range(shape.processes):
            cluster = [f"--coordinator={address}", f"--num_processes={shape.processes}", f"--process_id={i}"]
            command = line + cluster * (shape.processes > 1)
            output = subprocess.DEVNULL if i else subprocess.PIPE
            processes.append(subprocess.Popen(command, env=env, stdout=output, stderr=log, text=True))
            at_exit.enter_context(processes[i])
            at_exit.callback(processes[i].kill)
        assert processes[0].stdout
        for text in processes[0].stdout:
            log.write(text)
            if kill_at is not None and text.startswith(f"step {kill_at}/"):
                for process in processes:
                    process.kill()
        codes = [process.wait() for process in processes]
        if codes != [-signal.SIGKILL if kill_at is not None else 0] * shape.processes:
            log.seek(0)
            last_line = (log.read().splitlines() or ["no output"])[-1]
            raise Failure(f"run '{workdir.name}' ended with exit codes {codes}: {last_line}")


def hashes(workdir: Path, step: int) -> list[str]:
    """Hashes of `_PARTS`: of the metrics of every step, and the fingerprints of the arrays in the last checkpoint."""
    from etils import epath

    from flax_mlm.checkpoint.format import read_meta

    arrays = read_meta(epath.Path(workdir) / "checkpoints" / str(step))["arrays"]
    lines, steps = metrics.lines(workdir), metrics.lines(workdir, "train")
    parts = (
        [[line[name] for name in _BATCHES] for line in steps],
        sorted(item for item in arrays.items() if item[0].startswith("params/")),
        sorted(item for item in arrays.items() if not item[0].startswith("params/")),
        [{k: v for k, v in line.items() if k not in _TIMES} for line in lines],
        json.loads((workdir / "result.json").read_text()),
    )
    return [files.digest(part)[:12] for part in parts]


if __name__ == "__main__":
    app.run(main)
