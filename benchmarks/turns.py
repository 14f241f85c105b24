"""Programs measured side by side: each in its own process, kept alive, told over a pipe when it is its turn.

The machine's speed drifts, and others use it. So all take turns (A B C, C B A, ...), a turn during which others used
more than `NOISE` of the processors is left out, and what is compared are medians over the turns of one run.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

NOISE = 0.08  # share of all processors
ROOT = Path(__file__).parent.parent

CPU = {"JAX_PLATFORMS": "cpu"}  # for a worker: else JAX looks for other devices first, where libtpu is for seconds

# As it was when the benchmark started: a peer must not run with settings of flax_mlm/distributed/environment.py.
ENVIRONMENT = dict(os.environ)


def python_of(peer: str) -> str:
    """The interpreter of a peer's virtual environment (benchmarks/setup.sh)."""
    folder = Path(os.environ.get("BENCH_VENVS", ROOT / ".venv-bench")).absolute()
    return str(folder / peer / "bin" / "python")


class Unavailable(Exception):
    """A program that cannot be measured here, and why."""


class Turn(NamedTuple):
    """One turn of one program."""

    seconds: list[float]  # of each step
    results: list[Any]  # what each step returned
    system: float  # share of its processor time that the kernel took
    foreign: float | None  # share of all processors that others used meanwhile; None: the system does not say

    @property
    def quiet(self) -> bool:
        return self.foreign is None or self.foreign <= NOISE

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds) / len(self.seconds)


class Worker:
    """A program of `benchmarks/workers/` in a process of its own.

    Attributes:
      name: of the program, in tables.
      started: what it said of its start: seconds to build and of the first step, its result, versions.
      turns: so far.
      peak_bytes: most memory that it ever held; device_peak_bytes: and on its accelerator.
    """

    def __init__(self, name: str, module: str, spec: dict[str, Any], environment: str = "", **variables: str):
        """Starts it; see `wait`.

        Args:
          module: in benchmarks/workers.
          spec: JSON-able, what it is told.
          environment: the peer's in whose virtual environment it runs (benchmarks/setup.sh); empty: ours.
          variables: beside those of the environment that we were started with.

        Raises:
          Unavailable: that environment is not there.
        """
        self.name, self.started, self.peak_bytes, self.device_peak_bytes = name, {}, 0, 0
        self.turns: list[Turn] = []
        python = python_of(environment) if environment else sys.executable
        line = [python, "-m", f"benchmarks.workers.{module}", json.dumps(spec)]
        pipe: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        try:
            self._process = subprocess.Popen(line, cwd=ROOT, env={**ENVIRONMENT, **variables}, **pipe)
        except FileNotFoundError:
            raise Unavailable(f"{name}: {python} is missing; run `bash benchmarks/setup.sh`") from None

    def wait(self) -> None:
        """Until it is built and has made its first step.

        Raises:
          Unavailable: it failed.
        """
        self.started = self._answer()

    def run(self, steps: int) -> Turn:
        """One turn of so many steps. Raises Unavailable if it failed."""
        before, start = _busy_seconds(), time.perf_counter()
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        answer = self._answer()
        busy, wall = _busy_seconds() - before, time.perf_counter() - start
        own = answer["user"] + answer["system"]
        foreign = max(0.0, busy - own) / wall / (os.cpu_count() or 1) if busy > 0.5 * own else None
        self.peak_bytes, self.device_peak_bytes = answer["peak_bytes"], answer["device_peak_bytes"]
        turn = Turn(answer["seconds"], answer["results"], answer["system"] / max(own, 1e-9), foreign)
        self.turns.append(turn)
        return turn

    @property
    def kept(self) -> list[Turn]:
        """The turns that count: the quiet ones, or all if none was."""
        return [turn for turn in self.turns if turn.quiet] or self.turns

    def median(self, of: Callable[[Turn], float] = lambda turn: turn.step_seconds) -> float:
        """Over the turns that count."""
        return statistics.median(map(of, self.kept))

    def summary(self) -> dict[str, Any]:
        """All that was measured, for a JSON file."""
        seconds = [turn.step_seconds for turn in self.turns]
        return {
            **self.started,
            "step_seconds": self.median(),
            "system_share": self.median(lambda turn: turn.system),
            "peak_bytes": self.peak_bytes,
            "device_peak_bytes": self.device_peak_bytes,
            "turns": [round(s, 6) for s in seconds],
            "foreign": [turn.foreign for turn in self.turns],
            "discarded": sum(not turn.quiet for turn in self.turns),
        }

    def close(self) -> None:
        """Ends it."""
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"it ended with {self._process.wait()}"}
        if "error" in answer:
            raise Unavailable(f"{self.name}: {answer['error']}")
        return answer


class Workers:
    """Those of one comparison. Leaving the context ends them.

    Attributes:
      ready: those that can be measured, by name.
      refused: the others, and why.
    """

    def __init__(self) -> None:
        self.ready: dict[str, Worker] = {}
        self.refused: dict[str, str] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.ready.values():
            worker.close()

    def start(self, name: str, module: str, spec: dict[str, Any], environment: str = "", **variables: str) -> None:
        """Starts one, as `Worker` does, and waits for it."""
        self.launch(name, module, spec, environment, **variables)
        self.wait()

    def launch(self, name: str, module: str, spec: dict[str, Any], environment: str = "", **variables: str) -> None:
        """Starts one, and does not wait: several may get ready at the same time, where that is not measured."""
        with self._refusing(name):
            self.ready[name] = Worker(name, module, spec, environment, **variables)

    def wait(self) -> None:
        """Until all that were started are ready."""
        for name, worker in list(self.ready.items()):
            if not worker.started:
                with self._refusing(name):
                    worker.wait()
                    say(f"  {name} is ready")

    def take_turns(self, rounds: int, seconds: float) -> None:
        """So many turns of about so many seconds for each, in both orders alternately; up to twice as many, while one
        has not had a quiet turn in half of the rounds. One that fails is refused."""
        steps = {}
        for name, worker in list(self.ready.items()):
            with self._refusing(name):
                turn = worker.run(3)  # warms up, and says how many steps make a turn
                steps[name] = max(1, round(seconds / statistics.median(turn.seconds)))
                worker.started["first_results"] = [worker.started.pop("result"), *turn.results]
                worker.turns.clear()
        for number in range(2 * rounds):
            quiet = [sum(turn.quiet for turn in worker.turns) for worker in self.ready.values()]
            if number >= rounds and 2 * min(quiet, default=0) >= rounds:
                break
            order = list(self.ready.items())
            for name, worker in order if number % 2 == 0 else reversed(order):
                with self._refusing(name):
                    worker.run(steps[name])

    @property
    def discarded(self) -> str:
        """How many turns were left out, as a sentence."""
        all_of_them = [turn for worker in self.ready.values() for turn in worker.turns]
        noisy = sum(not turn.quiet for turn in all_of_them)
        return f"{noisy} of {len(all_of_them)} turns were noisy: others used more than {NOISE:.0%} of the processors"

    @contextlib.contextmanager
    def _refusing(self, name: str) -> Iterator[None]:
        try:
            yield
        except Unavailable as e:
            say(f"  left out: {e}")
            self.refused[name] = str(e)
            if name in self.ready:
                self.ready.pop(name).close()


def machine() -> str:
    """What this ran on, in a line."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    wide = ", AVX-512" if any(" avx512f " in line for line in _lines("/proc/cpuinfo")) else ""  # ratios depend on it
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo")), 0)
    return f"{os.cpu_count()} × {names[0] if names else 'processor'}{wide}, {memory / 2**20:.0f} GiB"


def say(line: str) -> None:
    """Progress, beside the tables on stdout."""
    print(line, file=sys.stderr, flush=True)


def _busy_seconds() -> float:
    """Processor time used on this machine so far, by anyone, that stolen by the host included."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, (_lines("/proc/stat") or ["cpu" + 8 * " 0"])[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except OSError:  # not Linux
        return []
