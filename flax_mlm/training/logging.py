"""Reports of a run in training, lines on the console and in metrics.jsonl, and what they and the run share."""

import contextlib
import copy
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from flax_mlm.config.phases import Phase, is_over
from flax_mlm.config.schema import Config
from flax_mlm.data.mixture import DataCursor, Mixture
from flax_mlm.distributed import chips, preemption, processes
from flax_mlm.evaluation import metrics
from flax_mlm.storage.gcs import AnyPath
from flax_mlm.storage.lease import Lease
from flax_mlm.training.budget import Budget
from flax_mlm.training.metrics import Column, Means, Throughput, Writers, fit, train_columns


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Parts of a run that stay the same from its first step to its last, as one process has them.

    Attributes:
      phases: those of `config`.
      mixtures: the corpora of each phase.
      log: prints on process 0, and nothing elsewhere.
      lease, budget: of process 0 alone; `budget` only where the clock ends the run.
    """

    config: Config
    workdir: AnyPath
    phases: list[Phase]
    mixtures: list[Mixture]
    mesh: Mesh
    group: processes.ProcessGroup
    stop: preemption.Stop
    log: Callable[[str], None]
    lease: Lease | None
    budget: Budget | None


class Step(NamedTuple):
    """A step that was dispatched.

    Attributes:
      number: updates made with it.
      cursor: position of the next batch in its data.
      metrics: on the devices.
      waited: seconds that it waited for its batch.
      ended: `Throughput.now()` at its end; None where that is not known before its metrics are read.
    """

    number: int
    phase: int
    cursor: DataCursor
    metrics: dict[str, jax.Array]
    waited: float
    ended: float | None


class Logger:
    """Counts tokens, FLOPs and seconds, and writes them with the metrics. Only process 0 has `writers`.

    Attributes:
      last: metrics of the last train line.
    """

    def __init__(self, context: RunContext, writers: Writers | None, meta: dict[str, Any]):
        """Starts from the `meta` of the restored step, which is empty for a new run; see `saved`."""
        self._context, self.writers = context, writers
        self.last: dict[str, float] = {}
        self.speed = Throughput(chips.peak_flops(context.mesh.devices.flat[:]), meta.get("totals", {}))
        self._means = Means(meta.get("sums", {}))

    def saved(self) -> dict[str, Any]:
        """Returns what a checkpoint stores, so that a run that continues from it writes the same lines."""
        return {"totals": self.speed.totals(), "sums": copy.deepcopy(self._means.sums)}

    @contextlib.contextmanager
    def pause(self, activity: str) -> Iterator[None]:
        """Excludes the time of the block from the speed, and tells the budget about it."""
        budget = self._context.budget
        with self.speed.paused(), budget.pause(activity) if budget else contextlib.nullcontext():
            yield

    def train(self, step: Step, flops: float) -> dict[str, float]:
        """Waits for a step, counts it, and writes metrics every `train.log_every` steps and after the last one: means
        over the steps since the last line, or else those of the last step (see `Means`).

        Returns:
          Metrics of the step.
        """
        values = {name: float(value) for name, value in jax.device_get(step.metrics).items()}
        context, progress, logged = self._context, values["progress"], {**values}
        del logged["stop"]
        self._means.add(logged)
        ended = self.speed.now() if step.ended is None else step.ended
        self.speed.add(progress, values["tokens"], flops, step.waited, ended)
        if step.number % context.config.train.log_every == 0 or is_over(context.phases, step.number, progress):
            line = self._means.report(logged) | {"rows": step.cursor.row} | self.speed.report(progress)
            line |= _epochs(step.cursor, context.mixtures[step.phase])
            self.last = line
            self._write(step.number, "train", progress, train_columns(line), line)
        return values

    def validation(self, step: int, progress: float, result: dict[str, float]) -> None:
        """Writes the held-out metrics, and the time used of a budget."""
        losses = [f"{name} {result[f'loss/{name}']:.4f}" for name in metrics.corpus_names(result)]
        summary = [f"validation loss {result['loss']:.4f}", f"accuracy {result['accuracy']:.4f}", *losses]
        budget = self._context.budget
        used = {"budget_seconds": budget.used()} if budget else {}
        self._write(step, "validation", progress, [(0, text) for text in summary], result | self.speed.totals() | used)
        if self.writers:
            self.writers.flush()

    def clozes(self, step: int, progress: float, result: dict[str, Any], table: str) -> None:
        """Writes the ranks of the clozes' answers; `table`, Markdown, goes to TensorBoard."""
        numbers = {name: x for name, x in result.items() if name != "answers"}
        summary = f"clozes  top1 {result['top1']:.2f}  top5 {result['top5']:.2f}"
        self._write(step, "cloze", progress, [(0, summary)], numbers, table)

    def _write(
        self, step: int, kind: str, progress: float, columns: list[Column], values: dict[str, Any], text: str = ""
    ) -> None:
        """Prints a line, of the columns for which a terminal has room, and writes the values."""
        if self.writers:
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            print(fit([(0, f"step {self.position(step, progress)}"), *columns], width), flush=True)
            self.writers.write(step, kind, values, text)

    def position(self, step: int, progress: float) -> str:
        """Formats a step and the run's total, which is extrapolated for a run with a budget."""
        train = self._context.phases[-1].config.train
        total = f"~{max(step, round(step / max(progress, 1e-9)))}" if train.budget_minutes else f"{train.steps}"
        return f"{step}/{total}"


def _epochs(cursor: DataCursor, mixture: Mixture) -> dict[str, float]:
    """Epochs of each corpus so far, where there are several."""
    epochs = cursor.stream(mixture).epochs(cursor.row)
    names = [f"epochs/{name}" for name in mixture.corpora]
    return dict(zip(names, epochs, strict=True)) if len(names) > 1 else {}
