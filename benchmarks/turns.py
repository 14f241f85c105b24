"""Programs measured side by side: each in its own process, kept alive, told over a pipe when it is its turn.

The machine's speed drifts, and others use it. So all take turns (A B C, C B A, ...), a turn during which others used
more than `NOISE` of the processors is left out, and what is compared are medians over the turns of one run.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NOISE = 0.08  # share of all processors
ROOT = Path(__file__).parent.parent

# As it was when the benchmark started: a peer must not run with settings that `flax_mlm.environment` makes for us.
_ENVIRONMENT = dict(os.environ)


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
      peak_bytes: most memory that it ever held.
    """

    def __init__(self, name: str, module: str, spec: dict[str, Any], python: str = sys.executable, **env: str):
        """Starts it; see `wait`.

        Args:
          module: in benchmarks/workers.
          spec: JSON-able, what it is told.
          python: of the environment that it runs in.
          env: variables beside those that we were started with.

        Raises:
          Unavailable: there is no such python.
        """
        self.name, self.started, self.peak_bytes = name, {}, 0
        self.turns: list[Turn] = []
        line = [python, "-m", f"benchmarks.workers.{module}", json.dumps(spec)]
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        try:
            self._process = subprocess.Popen(line, cwd=ROOT, env={**_ENVIRONMENT, **env}, **pipe)  # type: ignore[call-overload]
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
        self.peak_bytes = answer["peak_bytes"]
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


def take_turns(workers: Sequence[Worker], rounds: int, seconds: float) -> None:
    """So many turns of about so many seconds for each, in both orders alternately."""
    steps = {w.name: 1 for w in workers}
    for worker in workers:  # the first turn is for warming up, and says how many steps make a turn
        turn = worker.run(3)
        steps[worker.name] = max(1, round(seconds / min(turn.seconds)))
        worker.started["first_results"] = [worker.started.pop("result"), *turn.results]
        worker.turns.clear()
    for number in range(rounds):
        for worker in workers if number % 2 == 0 else list(reversed(workers)):
            worker.run(steps[worker.name])


def discarded(workers: Sequence[Worker]) -> str:
    """How many turns were left out, as a sentence."""
    noisy, total = (sum(f(t) for w in workers for t in w.turns) for f in (lambda t: not t.quiet, lambda t: True))
    return f"{noisy} of {total} turns were left out: others used more than {NOISE:.0%} of the processors meanwhile"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def machine() -> str:
    """What this ran on, in a line."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo")), 0)
    return f"{os.cpu_count()} × {names[0] if names else 'processor'}, {memory / 2**20:.0f} GiB"


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
