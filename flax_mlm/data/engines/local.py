"""Working on units in processes of this machine."""

import functools
import os
from concurrent import futures

from flax_mlm.data.engines.worker import MakeUnit, Task
from flax_mlm.data.preparation_log import progress
from flax_mlm.data.sources.base import Unit
from flax_mlm.data.tokenising import tokenise_in_processes, workers
from flax_mlm.data.tokenizer import load_tokenizer
from flax_mlm.data.units import make_units
from flax_mlm.data.work import Log


def run(task: Task, units: list[Unit], log: Log, num_workers: int = 0) -> None:
    """Does a task on each unit.

    Args:
      num_workers: processes; 0: one per core.

    Raises:
      UserError: the text cannot be read, or a process was killed.
    """
    num_workers = num_workers or os.cpu_count() or 1
    with progress(task.title, sum(unit.size for unit in units), log) as show:
        if isinstance(task, MakeUnit):  # parts of one unit can be tokenised side by side
            path = task.work.tokenizer
            tokenise = functools.partial(tokenise_in_processes, tokenizer_path=path, num_workers=num_workers)
            make_units(units, task.work, load_tokenizer(path), task.data, tokenise, show)
            return
        done = 0
        with workers(num_workers) as pool:
            sizes = {pool.submit(task.do, unit): unit.size for unit in units}
            for finished in futures.as_completed(sizes):
                finished.result()
                show(done := done + sizes[finished])
