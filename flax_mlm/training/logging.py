"""Reports of a run in training: lines on the console and in metrics.jsonl."""

import contextlib
from collections.abc import Iterator
from typing import Any

from flax_mlm.config.phases import is_over
from flax_mlm.data.mixture import DataCursor
from flax_mlm.distributed.chips import peak_flops
from flax_mlm.evaluation import mlm
from flax_mlm.training.context import RunContext
from flax_mlm.training.metrics import Throughput, Writers, train_line


class Logger:
    """Counts tokens, FLOPs and seconds, and writes them with the metrics. Only process 0 has `writers`."""

    def __init__(self, context: RunContext, writers: Writers | None, progress: float, totals: dict[str, float]):
        """Starts the clock.

        Args:
          progress: fraction of the run that is done.
          totals: tokens_seen and train_seconds of that fraction; empty for a new run.
        """
        self._context, self.writers = context, writers
        self.speed = Throughput(progress, peak_flops(context.mesh.devices.flat[:]), totals)

    @contextlib.contextmanager
    def pause(self, activity: str) -> Iterator[None]:
        """Excludes the time of the block from the speed, and tells the budget about it."""
        budget = self._context.budget
        with self.speed.paused(), budget.pause(activity) if budget else contextlib.nullcontext():
            yield

    def train(self, step: int, phase: int, cursor: DataCursor, values: dict[str, float], flops: float) -> None:
        """Counts a step, and writes its metrics every `train.log_every` steps and after the last one."""
        context, progress = self._context, values["progress"]
        self.speed.add(values["tokens"], flops)
        is_due = step % context.config.train.log_every == 0 or is_over(context.phases, step, progress)
        if not (self.writers and is_due):
            return
        line = {name: value for name, value in values.items() if name != "stop"} | {"rows": cursor.row}
        line |= self.speed.report(progress) | _epochs(cursor, context.mixtures[phase])
        print(train_line(self._label(step, progress), line), flush=True)
        self.writers.write(step, "train", line)

    def validation(self, step: int, progress: float, result: dict[str, float]) -> None:
        """Writes the held-out metrics, and the time used of a budget."""
        if not self.writers:
            return
        losses = "".join(f"  {name} {result[f'loss/{name}']:.4f}" for name in mlm.corpus_names(result))
        summary = f"validation loss {result['loss']:.4f}  accuracy {result['accuracy']:.4f}{losses}"
        print(f"{self._label(step, progress)}  {summary}")
        budget = self._context.budget
        used = {"budget_seconds": budget.used()} if budget else {}
        self.writers.write(step, "validation", result | self.speed.totals() | used)
        self.writers.flush()

    def clozes(self, step: int, progress: float, result: dict[str, Any], table: str) -> None:
        """Writes the ranks of the clozes' answers; `table`, Markdown, goes to TensorBoard."""
        if not self.writers:
            return
        ranks = f"top1 {result['top1']:.2f}  top5 {result['top5']:.2f}"
        print(f"{self._label(step, progress)}  clozes  {ranks}", flush=True)
        self.writers.write(step, "cloze", {name: x for name, x in result.items() if name != "answers"}, table)

    def _label(self, step: int, progress: float) -> str:
        """`step N/TOTAL`; the total of a run with a budget is extrapolated."""
        train = self._context.phases[-1].config.train
        if train.has_budget:
            return f"step {step}/~{max(step, round(step / max(progress, 1e-9)))}"
        return f"step {step}/{train.steps}"


def _epochs(cursor: DataCursor, mixture: Any) -> dict[str, float]:
    """Epochs of each corpus so far, where there are several."""
    epochs = cursor.stream(mixture).epochs(cursor.row)
    names = [f"epochs/{name}" for name in mixture.corpora]
    return dict(zip(names, epochs, strict=True)) if len(names) > 1 else {}
