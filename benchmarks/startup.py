"""How long a person waits: for `--help`, for a config error, and for the first training step.

    python -m benchmarks.startup --json=startup.json > startup.md

Each is a process of its own, started in turns; medians of the time by the clock. The corpus is prepared beforehand. A
first step is cold when JAX_COMPILATION_CACHE_DIR is empty, and warm when JAX finds there the programs of a cold start.
"""

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from absl import flags

from benchmarks import turns  # first, for the environment as it was
from flax_mlm.cli import app, tables
from flax_mlm.config.schema import Config
from flax_mlm.errors import Failure
from flax_mlm.storage import files

_ROUNDS = flags.DEFINE_integer("rounds", 5, "starts of each kind", lower_bound=1)
_COMMANDS = flags.DEFINE_list(
    "commands",
    [
        *("prepare", "audit", "plan", "train", "sweep", "evaluate", "compare", "embed", "fill_mask", "export"),
        "verify_resume",
    ],
    "whose --help is asked for",
)
_JSON = flags.DEFINE_string("json", "", "file for all that was measured")


def seconds_to_end(line: list[str], code: int) -> float:
    """Of `python -m flax_mlm.LINE`. Raises Failure unless it ends with this code."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *line], cwd=turns.ROOT, env=turns.ENVIRONMENT, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode != code:
        raise Failure(f"{' '.join(line)} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return seconds


def seconds_to_first_step(line: list[str], **variables: str) -> float:
    """Until `train` says that its first step is done; it is ended then. Raises Failure if it never says so."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", *line], cwd=turns.ROOT, env={**turns.ENVIRONMENT, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said = []
    try:
        for printed in process.stdout or ():
            said.append(printed)
            if printed.startswith("step 1/"):
                return time.perf_counter() - start
        raise Failure(f"{' '.join(line)} made no step: {''.join(said)[-300:]}")
    finally:
        process.kill()
        process.communicate()


def main(config: Config) -> None:
    from flax_mlm.data.mixture import open_corpus

    corpus = open_corpus(config, turns.say)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        starts = itertools.count()
        compiled = ""  # by the last cold start

        def first_step(cold: bool) -> float:
            nonlocal compiled
            number = next(starts)
            compiled = str(folder / f"compiled-{number}") if cold else compiled
            options = {f"--config.{field}={value}" for field, value in asked(config).items()}
            workdir = f"--workdir={folder / str(number)}"
            line = ["flax_mlm.train", workdir, f"--config.data.corpus={corpus}", *sorted(options)]
            cache = {"JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            return seconds_to_first_step(line, **cache)

        kinds: dict[str, Callable[[], float]] = {
            f"{name} --help": lambda name=name: seconds_to_end([f"flax_mlm.{name}", "--help"], 0)
            for name in _COMMANDS.value
        }  # fmt: skip
        wrong = ["flax_mlm.train", "--workdir=none", "--config.model.num_heads=7"]
        kinds["a config error"] = lambda: seconds_to_end(wrong, 2)
        kinds["first step, cold"] = lambda: first_step(cold=True)
        kinds["first step, warm"] = lambda: first_step(cold=False)
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(_ROUNDS.value):
            for kind, measure in list(kinds.items()) if number % 2 == 0 else list(kinds.items())[::-1]:
                seconds[kind].append(measure())
    rows = [[k, f"{statistics.median(s):.2f}", f"{min(s):.2f} to {max(s):.2f}"] for k, s in seconds.items()]
    print(tables.markdown(("until", "seconds", "from, to"), rows))
    m = config.model
    print(f"\nThe step is that of {m.num_layers} layers of {m.hidden_size}. {turns.machine()}.")
    if _JSON.value:
        files.write_json(Path(_JSON.value), {"machine": turns.machine(), "seconds": seconds})


def asked(config: Config) -> dict[str, object]:
    """The fields in which this run differs from the config file of `train`, its default."""
    m, t = config.model, config.train
    return {
        "model.num_layers": m.num_layers, "model.hidden_size": m.hidden_size, "model.num_heads": m.num_heads,
        "model.intermediate_size": m.intermediate_size, "train.global_batch_size": t.global_batch_size,
        "train.log_every": 1, "train.steps": 1, "log.tensorboard": False,
    }  # fmt: skip


if __name__ == "__main__":
    app.run(main)
