"""Evaluations of a run while it trains: held-out loss, and clozes that a person can read."""

import contextlib
import functools

from flax_mlm.distributed.preemption import Stopped
from flax_mlm.evaluation import cloze, mlm
from flax_mlm.training.logging import Logger, RunContext
from flax_mlm.training.loop import Run


class Evaluator:
    """Evaluates the model of a run, and logs the results."""

    def __init__(self, context: RunContext, logger: Logger):
        self._context, self._logger = context, logger
        self._compiled, self._calibrated = set[int](), set[int]()  # phases

    def evaluate(self, run: Run) -> dict[str, float]:
        """Measures loss and accuracy on held-out rows (see `evaluation.mlm.run`).

        Raises:
          Stopped: a signal has come, on whichever process.
        """
        group, mixture = self._context.group, self._context.mixtures[run.phase]
        model = run.model()

        def must_stop() -> bool:
            group.progress("evaluating", run.step)
            return self._context.stop.requested

        if run.phase not in self._compiled:  # one batch compiles, which may take any time
            with group.untimed("compiling"), self._logger.pause("compiling"), contextlib.suppress(Stopped):
                mlm.run(model, mixture, lambda: True)
            self._compiled.add(run.phase)
        with self._logger.pause("evaluating"):
            result = mlm.run(model, mixture, must_stop)
        self._logger.validation(run.step, run.progress, result)
        return result

    def calibrate_budget(self, run: Run) -> None:
        """Evaluates once in each phase of a run with a budget, to learn what time its last evaluation will take."""
        if not self._context.config.train.budget_minutes or run.phase in self._calibrated:
            return
        self._calibrated.add(run.phase)
        if self._context.budget:
            self._context.budget.forget("evaluating")
        self.evaluate(run)

    def evaluate_clozes(self, run: Run) -> None:
        """Ranks the answers of the built-in clozes."""
        report_progress = functools.partial(self._context.group.progress, "filling clozes", run.step)
        report_progress()
        model = run.model()
        if clozes := cloze.fitting(model, cloze.BUILT_IN):
            with self._logger.pause("filling clozes"):
                result = cloze.run(model, clozes, report_progress)
            self._logger.clozes(run.step, run.progress, result, "\n\n".join(cloze.table(result)))
