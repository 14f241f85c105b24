"""A run that ends when its time is used up, whatever the machine: how far each step takes it.

The schedule is always laid over the time that is left: a step that takes a share of that takes the run as large a share
of what is left of it, and what a pause took is made up for by the next few steps. So pauses, other speeds and restarts
make it shorter or longer, but it ends annealed and in time.
What a kill has cost counts too: a thread writes down in the workdir, while it passes, what time is used.
"""

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator

from flax_mlm.errors import UserError
from flax_mlm.storage import files, gcs

_FILE = "clock.json"
_STARTED = time.monotonic()  # of this process, nearly
_AIM = 0.99  # of the budget: what comes after the last evaluation takes time, too
_MADE_UP = 0.1  # of what pauses took, by each step


class Budget:
    """The clock of one run; of several processes the first one's counts.

    Attributes:
      progress: the share of the run that is done.
      interval: seconds between two notes of the time used, which is what a kill may lose.
    """

    def __init__(self, workdir: gcs.AnyPath, seconds: float, progress: float = 0.0):
        """Goes on with the time that earlier starts have left.

        Raises:
          UserError: what they have used cannot be read.
        """
        self._workdir, self._file, self._seconds, self.progress = workdir, workdir / _FILE, seconds, progress
        try:
            with gcs.errors(workdir):
                found = json.loads(self._file.read_text()) if self._file.exists() else {"share": 0.0}
                self._before = float(found["share"]) * seconds
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"--workdir: '{self._file}', the time used, cannot be read ({type(e).__name__}: {e}); without the file "
                "the budget begins anew"
            ) from e
        self.interval = max(1.0, min(30.0, 0.002 * seconds))
        self._last_step: float | None = None
        self._step_seconds: float | None = None  # of a step, a running mean without pauses
        self._behind = 0.0  # seconds of pauses that progress has not made up for
        self._costs: dict[str, float] = {}  # seconds that are kept for what comes after the last step
        self.note()
        self._ended = threading.Event()
        threading.Thread(target=self._keep_noting, name="budget", daemon=True).start()

    def used(self) -> float:
        """Seconds, over all starts."""
        return self._before + time.monotonic() - _STARTED

    def next_progress(self) -> float:
        """The share of the run that the step that begins now ends at."""
        self._time_step()
        self._last_step, step = time.monotonic(), self._step_seconds or 0.0
        # That the last step was the last becomes known while another one runs.
        left = _AIM * self._seconds - sum(self._costs.values()) - self.used() - step
        moved = step + _MADE_UP * self._behind
        self.progress += (1.0 - self.progress) * (min(moved / (left + self._behind), 1.0) if left > step else 1.0)
        self._behind -= _MADE_UP * self._behind
        return self.progress

    def forget(self, what: str) -> None:
        """Keeps no time for it until it has been timed again."""
        self._costs.pop(what, None)

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Around what is no step. For what has to be done at the end of the run again, "evaluating" and "saving", time
        is kept: as much as it took once, without what it compiled the first time. A save is "saving" until it is
        committed."""
        self._time_step()
        start = time.monotonic()
        yield
        took = time.monotonic() - start
        if self._step_seconds is not None:  # before the first step nothing was planned
            self._behind += took
        if what in ("evaluating", "saving"):
            self._costs[what] = min(took, self._costs.get(what, math.inf))

    def note(self) -> None:
        """Writes down the time used."""
        with contextlib.suppress(OSError, gcs.Unreachable), gcs.errors(self._workdir):  # it will be tried again
            files.write_json(self._file, {"seconds": self.used(), "share": self.used() / self._seconds})

    def close(self) -> None:
        """Writes down the time used for the last time."""
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
