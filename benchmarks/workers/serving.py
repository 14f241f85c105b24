"""The side of a worker: builds what is measured, then makes steps when told. Standard library only, for it runs in
the environments of all peers.
"""

import importlib.metadata
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def seconds_of_calls(functions: dict[str, Callable[[], Any]], calls: int) -> dict[str, float]:
    """Mean seconds of one call of each, after one that does not count."""
    seconds = {}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        seconds[name] = (time.perf_counter() - start) / calls
    return seconds


def serve(
    build: Callable[[dict[str, Any]], Callable[[], Any]],
    packages: Sequence[str],
    device_peak_bytes: Callable[[], int] = lambda: 0,
) -> None:
    """Talks with `benchmarks.turns.Worker`.

    Args:
      build: (spec) -> a function that makes one step and returns what is to be reported of it, a loss say; or, where
        a device works on by itself, a function that waits for that. It is called when the next step has begun.
      packages: whose versions are reported.
      device_peak_bytes: most memory ever held on an accelerator.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        start = time.perf_counter()
        step = build(json.loads(sys.argv[1]))
        built = time.perf_counter()
        result = _read(step())
        tell(
            {
                "build_seconds": built - start,
                "first_step_seconds": time.perf_counter() - built,
                "result": result,
                "python": sys.version.split()[0],
                "versions": {name: importlib.metadata.version(name) for name in packages},
            }
        )
        for line in sys.stdin:
            before = resource.getrusage(resource.RUSAGE_SELF)
            results, times, steps = [], [time.perf_counter()], int(line)
            unread = step()
            for number in range(steps):
                following = step() if number + 1 < steps else None
                results.append(_read(unread))
                times.append(time.perf_counter())
                unread = following
            used = resource.getrusage(resource.RUSAGE_SELF)
            tell(
                {
                    "seconds": [after - before for before, after in itertools.pairwise(times)],
                    "results": results,
                    "user": used.ru_utime - before.ru_utime,
                    "system": used.ru_stime - before.ru_stime,
                    "peak_bytes": _peak_bytes(),
                    "device_peak_bytes": device_peak_bytes(),
                }
            )
    except BrokenPipeError:
        pass  # the benchmark has ended
    except Exception as e:
        tell({"error": f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"})
        raise


def _read(result: Any) -> Any:
    return result() if callable(result) else result


def _peak_bytes() -> int:
    """Most memory that this process ever held."""
    try:
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
