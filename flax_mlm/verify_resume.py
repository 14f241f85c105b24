"""Command: does a run of this config end the same when it is killed, and when it moves to other devices?

    python -m flax_mlm.verify_resume --config=configs/quickstart.py
    python -m flax_mlm.verify_resume --config=configs/quickstart.py --config.train.reproducible=True --shapes=1x8,2x4

It trains a few steps of the config four times, in processes of their own: without a break; killed (SIGKILL) and
started again; begun without a break and continued on other numbers of processes and devices; and moved from each of
these to the next by kills. Then it compares what they left, bit for bit, and leaves with 1 where a promise is broken:

  - on the same devices everything is the same;
  - on others the batches and masks are the same, and with train.reproducible everything is.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from flax_mlm.cli import app as command
from flax_mlm.config import phases
from flax_mlm.config.schema import LENGTHS, Config
from flax_mlm.errors import Failure, UserError
from flax_mlm.storage import gcs
from flax_mlm.training import metrics

_STEPS = flags.DEFINE_integer("steps", 30, "steps of each run", lower_bound=6)
_KILLS = flags.DEFINE_integer("kills", 2, "kills in the run that is killed", lower_bound=1)
_SHAPES = flags.DEFINE_string(
    "shapes", "1x4,2x2", "processes x devices of the moves, comma-separated, on CPUs; empty: no moves"
)
_WORKDIR = flags.DEFINE_string("workdir", "", "keep the runs in this folder; default: a temporary one")

_RATES = ("tokens_per_second", "data_wait", "eta_seconds", "mfu", "train_seconds")
_BATCHES = ("step", "rows", "batch_fingerprint", "mask_rate", "tokens", "predicted_tokens")


class Shape(NamedTuple):
    """Devices to run on; None: those that are here, as they are."""

    processes: int = 1
    devices: int | None = None

    def __str__(self) -> str:
        return "here" if self.devices is None else f"{self.processes}x{self.devices}"


class Found(NamedTuple):
    """Hashes of what a run has left."""

    batches: str
    parameters: str
    state: str
    metrics: str
    result: str


def main(config: Config) -> int:
    if _KILLS.value >= _STEPS.value:
        raise UserError(f"--kills is {_KILLS.value}; it must be less than --steps, {_STEPS.value}")
    shapes = parse_shapes(_SHAPES.value)
    if shapes and backend() != "cpu":
        print("devices other than CPUs cannot be divided at will: no moves (on a CPU: JAX_PLATFORMS=cpu)")
        shapes = []
    every = max(2, _STEPS.value // 3)
    in_steps: dict[str, Any] = {**dict.fromkeys(LENGTHS, 0.0), "steps": _STEPS.value}
    in_steps["phases"] = phases.in_fractions(phases.parse_phases(config))
    often: dict[str, Any] = {"log_every": 1, "eval_every": every, "checkpoint_every": every, "max_to_keep": 9}
    o = config.optimizer
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(o, lawa_every=min(o.lawa_every, max(1, (_STEPS.value - 1) // o.lawa_count))),
        train=dataclasses.replace(config.train, **in_steps, **often),
        eval=dataclasses.replace(config.eval, max_rows=config.eval.max_rows or 2 * config.eval.batch_size),
        log=dataclasses.replace(config.log, tensorboard=False, wandb_project=""),
    )
    try:
        phases.parse_phases(config)
    except UserError as e:
        raise UserError(f"--steps is {_STEPS.value}, which may be too few: {e}") from e
    here = Shape()
    with folder_of_runs() as folder:
        code = "from flax_mlm.config.load import from_dict\n\n"
        code += f"def get_config():\n    return from_dict({config.to_dict()!r})\n"
        (folder / "config.py").write_text(code)

        def run(name: str, *legs: tuple[Shape, int | None], begun: Path | None = None) -> Found:
            workdir = folder / name
            if begun:
                copy_of_start(begun, workdir, every)
            for shape, kill_at in legs:
                train(folder / "config.py", workdir, shape, kill_at)
            found = hashes(workdir, _STEPS.value)
            print("  ".join([f"{name:12}", f"{' > '.join(str(s) for s, _ in legs):24}", *found]), flush=True)
            return found

        print("  ".join([f"{'run':12}", f"{'devices':24}", *(f"{name:12}" for name in Found._fields)]))
        straight = run("straight", (here, None))
        kills = [_STEPS.value * (i + 1) // (_KILLS.value + 1) for i in range(_KILLS.value)]
        broken = compare("killed", straight, run("killed", *((here, k) for k in kills), (here, None)), True)
        exact = config.train.reproducible
        for shape in shapes:
            moved = run(f"to {shape}", (shape, None), begun=folder / "straight")
            broken += compare(f"to {shape}", straight, moved, exact)
        if len(shapes) > 1:
            stops = [_STEPS.value * (i + 1) // (len(shapes) + 1) for i in range(len(shapes))]
            legs = [*zip(shapes, stops, strict=True), (here, None)]
            broken += compare("moving", straight, run("moving", *legs), exact)
    if broken:
        raise Failure("; ".join(broken))
    print("every promise is kept: what must be the same is the same, bit for bit")
    if shapes and not exact:
        print("with train.reproducible the parameters would be too, on all numbers of devices that batch_groups allows")
    return 0


def compare(name: str, expected: Found, found: Found, exact: bool) -> list[str]:
    """What is broken, in words."""
    fields = Found._fields if exact else ("batches",)
    wrong = [f for f in fields if getattr(expected, f) != getattr(found, f)]
    return [f"run '{name}' differs from 'straight' in its {', '.join(wrong)}"] if wrong else []


def parse_shapes(text: str) -> list[Shape]:
    """ "1x4,2x2" -> shapes. Raises UserError."""
    try:
        numbers = [tuple(map(int, part.split("x"))) for part in text.split(",") if part]
        shapes = [Shape(processes, devices) for processes, devices in numbers]
        if any(min(n) < 1 for n in numbers):
            raise ValueError(text)
    except ValueError:
        raise UserError(f"--shapes is '{text}'; it takes PROCESSESxDEVICES, comma-separated, such as 1x4,2x2") from None
    return shapes


def backend() -> str:
    """Where JAX computes here. Asked in a process of its own: an accelerator serves one at a time."""
    code = "from flax_mlm.distributed import environment; environment.prepare(); import jax; "
    code += "print(jax.default_backend())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def folder_of_runs() -> Iterator[Path]:
    if not _WORKDIR.value:
        with tempfile.TemporaryDirectory(prefix="verify_resume-") as name:
            yield Path(name)
        return
    gcs.refuse("--workdir", _WORKDIR.value)
    folder = Path(_WORKDIR.value).expanduser().absolute()
    try:
        folder.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"--workdir: '{folder}' cannot be made ({e.strerror}); name a new folder") from e
    yield folder


def copy_of_start(begun: Path, workdir: Path, step: int) -> None:
    """A run that has just saved `step`."""
    shutil.copytree(begun / "checkpoints" / str(step), workdir / "checkpoints" / str(step))
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(begun / name, workdir / name)


def train(config_file: Path, workdir: Path, shape: Shape, kill_at: int | None) -> None:
    """Runs `train` to its end, or until it has done step `kill_at` and is killed."""
    line = [sys.executable, "-m", "flax_mlm.train", f"--config={config_file}", f"--workdir={workdir}"]
    env, address = dict(os.environ), f"127.0.0.1:{free_port()}"
    if shape.devices is not None:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={shape.devices}"
        env["JAX_PLATFORMS"] = "cpu"
    with contextlib.ExitStack() as at_exit:
        log = at_exit.enter_context((workdir.parent / f"{workdir.name}.log").open("a+"))
        processes = []
        for i in range(shape.processes):
            place = [f"--coordinator={address}", f"--num_processes={shape.processes}", f"--process_id={i}"]
            process = subprocess.Popen(
                line + place * (shape.processes > 1),
                env=env, stdout=subprocess.PIPE if i == 0 else subprocess.DEVNULL, stderr=log, text=True,
            )  # fmt: skip
            at_exit.callback(process.wait)
            at_exit.callback(process.kill)
            processes.append(process)
        assert processes[0].stdout
        for said in processes[0].stdout:
            log.write(said)
            if kill_at is not None and said.startswith(f"step {kill_at}/"):
                for process in processes:
                    process.send_signal(signal.SIGKILL)
        codes = [process.wait() for process in processes]
        if codes != [-signal.SIGKILL if kill_at is not None else 0] * shape.processes:
            log.seek(0)
            raise Failure(f"run '{workdir.name}' ended with {codes}: {(log.read().splitlines() or ['?'])[-1]}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def hashes(workdir: Path, step: int) -> Found:
    """Of the metrics of every step, and of the arrays by the fingerprints in the checkpoint."""
    from etils import epath

    from flax_mlm.checkpoint.format import read_meta

    arrays = read_meta(epath.Path(workdir) / "checkpoints" / str(step))["arrays"]
    lines, steps = metrics.lines(workdir), metrics.lines(workdir, "train")
    return Found(
        digest([[line[name] for name in _BATCHES] for line in steps]),
        digest(sorted(item for item in arrays.items() if item[0].startswith("params/"))),
        digest(sorted(item for item in arrays.items() if not item[0].startswith("params/"))),
        digest([{k: v for k, v in line.items() if k not in _RATES} for line in lines]),
        digest(json.loads((workdir / "result.json").read_text())),
    )


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


if __name__ == "__main__":
    command.run(main)
