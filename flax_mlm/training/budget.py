"""Time budget of a run: progress per step follows from the clock, so that the schedule ends when the time does.

Each step advances progress by the fraction of the remaining time that it takes; the time of a pause is recovered over
the next steps. A slower machine, a pause or a restart changes the number of steps, but the learning rate is annealed in
time. A thread records the time used in the workdir, so that time lost by a kill counts as well.

Where the time is used up long before the schedule's end, as after a slow restart, the run still ends annealed: the rest
of the schedule is passed in some 25 steps, each phase in at least one, and is reported as cut.
"""

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from flax_mlm.errors import UserError
from flax_mlm.storage import files, gcs
from flax_mlm.storage.retry import retrying

_FILE = "clock.json"
_TARGET = 0.99  # of the budget: leaving after the last evaluation takes time, too
_RECOVERY = 0.1  # fraction of the pauses so far that each step recovers
_FALL = 0.25  # of what is left of the schedule: the most that a step takes, unless steps have taken half as much before
_END = 1e-3  # of the schedule, which the last step may take


class Budget:
    """Clock of one run, kept by process 0.

    Attributes:
      progress: fraction of the run that is done, 0.0 to 1.0.
      interval: seconds between two records of the time used: as much may be lost by a kill.
    """

    def __init__(self, workdir: gcs.AnyPath, seconds: float, started: float, begins: Sequence[float] = ()):
        """Continues with the time that earlier starts have left.

        Args:
          seconds: the whole budget.
          started: `time.monotonic()` when this start began.
          begins: fractions of the run at which phases begin; a step ends at each.

        Raises:
          UserError: clock.json, the time used, cannot be read.
        """
        self._workdir, self._file, self._seconds, self.progress = workdir, workdir / _FILE, seconds, 0.0
        self._stops = [float(np.nextafter(np.float32(x), np.float32(2))) for x in begins if x > 0]  # on the devices too
        used, self._cut_at = read_used(workdir, self._file)
        self._began = started - used
        self.interval = max(1.0, min(30.0, 0.002 * seconds))
        self._last_step: float | None = None
        self._step_seconds: float | None = None  # running mean, without pauses
        self._pace = 0.0  # progress of a step, running mean
        self._behind = 0.0  # seconds of pauses that are not recovered yet
        self._reserved: dict[str, float] = {}  # seconds for what follows the last step
        self.note()
        self._ended = threading.Event()
        threading.Thread(target=self._keep_noting, name="budget", daemon=True).start()

    def used(self) -> float:
        """Returns the seconds used, over all starts."""
        return time.monotonic() - self._began

    def next_progress(self) -> float:
        """Returns the progress at which the step that starts now ends."""
        self._time_step()
        self._last_step, step = time.monotonic(), self._step_seconds or 0.0
        # One more step is made before the last one is known to be the last.
        left = _TARGET * self._seconds - sum(self._reserved.values()) - self.used() - step
        moved = step + _RECOVERY * self._behind
        self._advance(min(moved / (left + self._behind), 1.0) if left > step else 1.0)
        self._behind -= _RECOVERY * self._behind
        return self.progress

    def _advance(self, fraction: float) -> None:
        """Advances the progress by this fraction of what is left, or by less where that would be a jump."""
        left = 1.0 - self.progress
        largest = left if left <= _END else max(2.0 * self._pace, min(_FALL * left, self.progress + 0.01))
        move = min(fraction * left, largest)
        if move == fraction * left > 0.0:
            self._pace += (move - self._pace) * (0.1 if self._pace else 1.0)
        elif fraction > _FALL and self._cut_at == 1.0:
            self._cut_at = self.progress
            for cut in self.cut().values():
                left_over = f"the last {cut:.0%} of the schedule, which a few steps complete"
                print(f"WARNING: train.budget_minutes is used up before {left_over}", flush=True)
        to_stops = [stop - self.progress for stop in self._stops if stop > self.progress]
        self.progress += min([move, *to_stops])

    def cut(self) -> dict[str, float]:
        """Returns `schedule_cut`, the fraction of the schedule for which no time was left; nothing below 5%."""
        cut = 1.0 - self._cut_at
        return {"schedule_cut": cut} if cut >= 0.05 else {}

    def forget(self, activity: str) -> None:
        """Reserves no time for an activity until it is timed again."""
        self._reserved.pop(activity, None)

    @contextlib.contextmanager
    def pause(self, activity: str) -> Iterator[None]:
        """Counts the block as a pause. Time is reserved for what the end of the run repeats, "evaluating" and "saving"
        (until the checkpoint is committed): the shortest that it took, so without compilation."""
        self._time_step()
        start = time.monotonic()
        yield
        took = time.monotonic() - start
        if self._step_seconds is not None:  # nothing was planned before the first step
            self._behind += took
        if activity in ("evaluating", "saving"):
            self._reserved[activity] = min(took, self._reserved.get(activity, math.inf))

    def note(self) -> None:
        """Records the time used."""
        with contextlib.suppress(OSError, gcs.Unreachable), gcs.errors(self._workdir):  # the next record tries again
            cut = {"cut_at": self._cut_at} if self._cut_at < 1.0 else {}
            files.write_json(self._file, {"seconds": self.used()} | cut)

    def close(self) -> None:
        """Records the time used for the last time."""
        self._ended.set()
        self.note()

    def _time_step(self) -> None:
        if self._last_step is not None:
            took, mean = time.monotonic() - self._last_step, self._step_seconds
            self._step_seconds = took if mean is None else mean + 0.1 * (took - mean)
        self._last_step = None

    def _keep_noting(self) -> None:
        while not self._ended.wait(self.interval):
            self.note()


@retrying
def read_used(workdir: gcs.AnyPath, file: gcs.AnyPath) -> tuple[float, float]:
    """Reads the seconds used, and the progress at which they were used up, else 1.0. Raises UserError."""
    try:
        with gcs.errors(workdir):
            recorded = json.loads(file.read_text()) if files.exists(file) else {"seconds": 0.0}
            return float(recorded["seconds"]), float(recorded.get("cut_at", 1.0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        what = f"'{file}', the time used, cannot be read ({type(e).__name__}: {e})"
        raise UserError(f"--workdir: {what}; delete the file to restart the budget") from e
