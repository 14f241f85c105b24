"""A run that ends when its time is used up, whatever the machine: how far each step takes it.

The schedule is always laid over the time that is left: a step that takes a share of that takes the run as large a share
of what is left of it. So pauses, other speeds and restarts make it shorter or longer, but it ends annealed and in time.
What a kill has cost counts too: the time used is written down in the workdir while it passes.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator

from flax_mlm import buckets, files
from flax_mlm.errors import UserError

_FILE = "clock.json"
_STARTED = time.monotonic()  # of this process, nearly
_AIM = 0.99  # of the budget: what comes after the last evaluation takes time, too


class Budget:
    """The clock of one run; of several processes the first one's counts."""

    def __init__(self, workdir: buckets.AnyPath, seconds: float, progress: float):
        """Goes on from `progress`, with the time that earlier starts have left.

        Raises:
          UserError: what they have used cannot be read.
        """
        self._workdir, self._file, self._seconds, self.progress = workdir, workdir / _FILE, seconds, progress
        try:
            with buckets.errors(workdir):
                self._before = float(json.loads(self._file.read_text())["seconds"]) if self._file.exists() else 0.0
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"--workdir: '{self._file}', the time used, cannot be read ({type(e).__name__}: {e}); without the file "
                "the budget begins anew"
            ) from e
        self.note()  # what it took to get here is used, if nothing else comes of this start
        self._last_step: float | None = None
        self._step_seconds: float | None = None  # of a step, a running mean without pauses
        self._costs: dict[str, float] = {}

    def used(self) -> float:
        """Seconds, over all starts."""
        return self._before + time.monotonic() - _STARTED

    def next_progress(self) -> float:
        """The share of the run that the step that begins now ends at."""
        now = time.monotonic()
        if self._last_step is not None:
            took, mean = now - self._last_step, self._step_seconds
            self._step_seconds = took if mean is None else mean + 0.1 * (took - mean)
        self._last_step, step = now, self._step_seconds or 0.0
        left = _AIM * self._seconds - sum(self._costs.values()) - self.used()
        self.progress += (1.0 - self.progress) * (min(step / left, 1.0) if left > step else 1.0)
        if now - self._noted > min(30.0, 0.01 * self._seconds):
            self.note()
        return self.progress

    def note(self) -> None:
        """Writes down the time used."""
        self._noted = time.monotonic()
        with contextlib.suppress(OSError, buckets.Unreachable), buckets.errors(self._workdir):  # it will be tried again
            files.write_json(self._file, {"seconds": self.used()})

    def forget(self, what: str) -> None:
        """Keeps no time for it until it has been timed again."""
        self._costs.pop(what, None)

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Around what is no step. For what has to be done at the end of the run again, "evaluating" and "saving", time
        is kept: as much as it took once, without what it compiled the first time."""
        start = time.monotonic()
        yield
        if what in ("evaluating", "saving"):
            self._costs[what] = min(time.monotonic() - start, self._costs.get(what, math.inf))
        self._last_step = None
