"""Working on units as tasks of Ray: on this machine, or on a cluster.

It runs in an environment of its own, see launch/ray-requirements.txt.
"""

import inspect
import json
import logging
import os
from collections import deque
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere

import ray

from flax_mlm.data.engines.worker import Run, Task, last_line
from flax_mlm.data.preparation_log import progress
from flax_mlm.data.sources.base import Unit
from flax_mlm.data.work import Log
from flax_mlm.errors import Failure, UserError, did_you_mean

_TASKS_PER_CPU = 4  # submitted at a time, so that no machine waits for the next one
_RETRIES = 3  # of a unit whose process was lost, or whose file server did not answer
_QUIET = {"logging_level": logging.ERROR, "log_to_driver": False, "include_dashboard": False}


def engine(arguments: list[str]) -> Run:
    """Returns what works on units with Ray.

    Args:
      arguments: of `ray.init`, such as --address=auto or --num_cpus=2; RAY_ADDRESS also names a cluster.

    Raises:
      UserError: there is no such argument.
    """
    options = _QUIET | _parse(arguments)

    def run(task: Task, units: list[Unit], log: Log) -> None:
        task.work.forget_failures()
        try:
            ray.init(**options)
            num_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
            log(f"{task.title}: {len(units):,} units on Ray, {num_cpus} CPUs")
            _map(task, units, _TASKS_PER_CPU * num_cpus, log)
        except (ray.exceptions.RayError, ConnectionError, ValueError, RuntimeError) as e:
            task.check()
            raise Failure(f"Ray: {last_line(e)}; finished units are kept, run the same command again") from e
        finally:
            ray.shutdown()
        task.check()

    return run


def _map(task: Task, units: list[Unit], limit: int, log: Log) -> None:
    """Works on units as tasks of Ray, at most `limit` at a time. Raises RayError."""
    remote = ray.remote(max_retries=_RETRIES, retry_exceptions=True)(_call)
    shared, waiting, sizes = ray.put(task), deque(units), dict[Any, int]()
    done = 0
    with progress(task.title, sum(unit.size for unit in units), log) as show:
        while waiting or sizes:
            while waiting and len(sizes) < limit:
                unit = waiting.popleft()
                sizes[remote.remote(shared, unit)] = unit.size
            finished, _ = ray.wait(list(sizes))
            ray.get(finished)
            done += sum(map(sizes.pop, finished))
            show(done)


def _call(task: Task, unit: Unit) -> int:
    return task(unit)


def _parse(arguments: list[str]) -> dict[str, Any]:
    """Parses --NAME=VALUE, where VALUE is JSON or a text. Raises UserError."""
    known = [name for name, p in inspect.signature(ray.init).parameters.items() if p.kind is p.KEYWORD_ONLY]
    known.append("address")
    options = {}
    for argument in arguments:
        name, is_given, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not is_given:
            raise UserError(f"--engine=ray: '{argument}' is no argument of ray.init; expected --NAME=VALUE")
        if name not in known:
            hint = did_you_mean(name, known, f"it has {', '.join(known[:4])}, ...")
            raise UserError(f"--engine=ray: ray.init has no argument '{name}'; {hint}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
