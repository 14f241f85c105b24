"""Saves, retention and restart: the checkpoints of one run.

See format.py for what a checkpoint consists of, and store.py for how it is deleted or quarantined.
"""

import concurrent.futures
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flax_mlm.checkpoint.fingerprint import fingerprints, table
from flax_mlm.checkpoint.format import Damaged, read_back, read_meta, refuse_other_start, restore, split_state
from flax_mlm.checkpoint.store import LiteralPath, Store, bound_retries, saved_steps
from flax_mlm.config.schema import Config
from flax_mlm.errors import Failure, UserError, as_user_error
from flax_mlm.storage import files, gcs, retry


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, two-tier retention, restart from the newest sound step.

    With several processes, every process makes one and calls the same methods; process 0 alone changes the folder.

    Attributes:
      failed_in_a_row: number of saves that have failed since the last one that succeeded.
      restored_meta: the `meta` of the step that was restored last; empty where there is none.
    """

    def __init__(self, workdir: gcs.AnyPath, config: Config, meta: dict[str, Any], lost_within: float = 0.0):
        """Opens the folder, and clears away what a killed run has left.

        Args:
          workdir: the folder of the run.
          config: its `train` section gives retention and the number of saves that may fail.
          meta: stored with every checkpoint; see `make_meta`.
          lost_within: seconds within which the loss of a process has ended the others (`ProcessGroup.lost_within`).
        """
        self._train, self._meta, self._lost_within = config.train, meta, lost_within
        self._workdir, self._folder = workdir, LiteralPath(workdir) / "checkpoints"
        self._is_main, self._is_alone = jax.process_index() == 0, jax.process_count() == 1
        bound_retries()
        atomicity = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), atomicity_options=atomicity)
        self._saving: int | None = None
        self._prunes = True  # when the save in progress is done
        self._newest: int | None = None  # committed step
        self._has_read_back, self._unread = False, dict[str, Any]()  # abstract items of a save that is to be read back
        self.failed_in_a_row, self.restored_meta = 0, dict[str, Any]()
        self._retention = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        # Orbax logs what it also raises, and this class reports that. So does asyncio of orbax's unfinished writes.
        logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
        logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
        self._unraisable_hook = sys.unraisablehook
        sys.unraisablehook = self._report_unraisable
        self._store = Store(self._folder)
        if self._is_main:
            with as_user_error(f"--workdir: '{workdir}' cannot be used: ", OSError), gcs.errors(workdir):
                self._store.create()
                self._store.sweep()
                self._store.empty_trash()

    def _report_unraisable(self, report: Any) -> None:
        """Leaves out what tensorstore says, after a save has failed, to event loops that orbax has closed by then."""
        if str(report.exc_value) != "Event loop is closed":
            self._unraisable_hook(report)

    def save(
        self, step: int, state: Any, before: Callable[[], None] = lambda: None, prunes: bool = True, **run_meta: Any
    ) -> bool:
        """Starts saving a state once the last save has finished; returns when it is copied from the devices.

        The first save is waited for and read back: what cannot be restored here is found now. A failure is reported,
        counted and cleaned up; the next save tries again.

        Args:
          step: the number of updates made so far.
          state: a TrainState, or another NamedTuple with `params`.
          before: called by process 0 before anything is written. Its UserError or Failure is raised, but a bucket that
            does not answer counts as a failed save.
          prunes: once it is saved, older steps are deleted as `train.max_to_keep` says.
          run_meta: further entries of `meta` (JSON): `config` (of the phase, with the run's `train.phases`), `totals`
            and `sums` (numbers, see `Logger.saved`), `phase` (its index), `cursor` (a `DataCursor` as a dict),
            `environment` (`jax_options.recorded`). Those of process 0 are stored.

        Returns:
          Whether the save was started, or the step was saved before.

        Raises:
          Failure: the state is not finite; more saves in a row have failed than `train.max_failed_saves` allows; or a
            save failed with several processes, which can only continue together.
        """
        self.wait()
        with self._counting_failures(step, OSError, gcs.Unreachable), gcs.errors(self._workdir):
            if self._is_main:
                before()
            self._prunes = prunes
            if self._agreed(int(step in saved_steps(self._workdir))):
                self._saving = step if self._unread else None
            elif not self._start(step, state, run_meta):
                return False
            return not self._unread or self.wait()
        return False  # the failure was counted

    def _start(self, step: int, state: Any, run_meta: dict[str, Any]) -> bool:
        items = split_state(state)
        sums = jax.device_get(fingerprints(items))
        for name, (_, _, not_finite) in sums.items():
            if not_finite:
                raise Failure(f"step {step} is not saved: {not_finite} values of {name} are not finite")
        meta = {**self._meta, "step": step, **run_meta, "arrays": table(items, sums)}
        meta["sha256"] = files.digest(meta)
        args = {item: ocp.args.StandardSave(tree) for item, tree in items.items()} | {"meta": ocp.args.JsonSave(meta)}
        with self._counting_failures(step, Exception):
            if self._is_main:
                self._store.sweep()  # a failed save may have continued in the background
                if str(step) in self._store.names():
                    raise FileExistsError(f"{self._folder / str(step)} exists, and no run of flax_mlm has written it")
            self._checkpointer.save(self._folder / str(step), args=ocp.args.Composite(**args), force=True)
            self._saving = step
            if not self._has_read_back:
                self._unread = jax.tree.map(ocp.utils.to_shape_dtype_struct, items)
            return True
        return False  # the failure was counted

    def wait(self) -> bool:
        """Waits until the last save is committed. Returns whether it is; raises as `save` does."""
        if (step := self._saving) is None:
            return True
        self._saving = None
        with self._counting_failures(step, Exception):
            self._checkpointer.wait_until_finished()
            # The folder decides, not what orbax reports.
            if self._is_main and step not in saved_steps(self._workdir):
                raise FileNotFoundError(f"{self._folder / str(step)} does not exist")
            if self._unread:
                self._read_back(step)
            self.failed_in_a_row, self._newest = 0, step
            if self._is_main and self._prunes:
                self._retention.submit(self._retain, step)
            return True
        return False  # the failure was counted

    def _read_back(self, step: int) -> None:
        """Reads a saved step, and deletes it where that is not what was saved. Raises as `read_back` does."""
        try:
            read_back(self._folder / str(step), self._unread)
        except Damaged:
            if self._is_main:
                self._store.delete(str(step))
            raise
        self._has_read_back, self._unread = True, {}

    @contextlib.contextmanager
    def _counting_failures(self, step: int, *errors: type[Exception]) -> Iterator[None]:
        """Counts, reports and cleans up after a save that fails with one of the errors, and suppresses it.

        Raises:
          Failure: more saves in a row have failed than allowed, or there are several processes.
        """
        try:
            yield
        except errors as error:
            self.failed_in_a_row += 1
            try:
                with gcs.errors(self._workdir):
                    if self._is_main:
                        with contextlib.suppress(OSError):  # as on a full disk; the next save sweeps again
                            self._store.sweep()
                    steps = saved_steps(self._workdir)
                last = f"step {steps[-1]} is the last one saved" if steps else "nothing is saved yet"
            except gcs.Unreachable:
                last = "the last one saved cannot be listed"
            report = f"step {step} could not be saved ({retry.reason(error)})"
            if not self._is_alone or self.failed_in_a_row >= self._train.max_failed_saves:
                raise Failure(f"{report}; {self.failed_in_a_row} saves in a row have failed; {last}") from error
            print(f"WARNING: {report}; {last}; the next save will try again", flush=True)

    def restore_latest(self, abstract: Any, log: Callable[[str], None]) -> Any | None:
        """Restores the newest sound state; returns None where nothing was ever saved.

        Args:
          abstract: a TrainState of shapes, dtypes and shardings.
          log: called with one line for each checkpoint that is restored, or skipped, and why.

        Raises:
          UserError: there are checkpoints, but none is sound; or they belong to another run.
          Failure: one cannot be read, though it is not damaged; or, with several processes, the newest is damaged.
        """
        items = split_state(abstract)
        self._take_back(items, log)
        while (step := self._agreed(max(saved_steps(self._workdir), default=-1))) >= 0:
            checkpoint = self._folder / str(step)
            try:
                meta = read_meta(checkpoint)
                refuse_other_start(f"--workdir: '{self._workdir}'", meta, self._meta)
                restored = restore(checkpoint, meta, items)
            except Damaged as e:
                self._quarantine(step, e, log)
                continue
            log(f"restored step {step} from {checkpoint}")
            self.restored_meta = meta
            return abstract._replace(**{**restored.pop("rest"), **restored})
        # Also when an earlier start has moved them there: a run never starts over by itself.
        if self._store.has_quarantine():
            what = f"none of the checkpoints in '{self._workdir}' is sound (they are in checkpoints/.quarantine)"
            raise UserError(f"{what}; use another --workdir")
        return None

    def _take_back(self, items: dict[str, Any], log: Callable[[str], None]) -> None:
        """Takes back from quarantine the last step that is sound after all, where it is newer than all others."""
        newest = max(saved_steps(self._workdir), default=-1)
        candidates = [path for path in self._store.quarantined() if int(path.name) > newest] if self._is_main else []
        while name := self._agreed_name(os.path.relpath(candidates.pop(0), self._folder) if candidates else ""):
            path = self._folder / name
            try:
                restore(path, read_meta(path), items)
            except UserError:
                continue
            if self._is_main:
                self._store.take_back(path)
            log(f"checkpoint {path.name} is sound after all, and taken back from {path.parent}")
            candidates = []

    def _agreed_name(self, name: str) -> str:
        """Returns the name of process 0."""
        if self._is_alone:
            return name
        padded = np.frombuffer(name.encode().ljust(256, b"\0"), np.uint8)
        return bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0").decode()

    def _quarantine(self, step: int, damage: Damaged, log: Callable[[str], None]) -> None:
        """Moves a damaged step to quarantine. With several processes raises Failure: others may have read it."""
        if not self._is_alone:
            time.sleep(self._lost_within)  # a lost peer fails the reading, too, and then the process ends here
        target = self._store.quarantine(str(step))
        log(f"checkpoint {step} skipped, and moved to {target}: {damage}")
        if not self._is_alone:
            raise Failure(f"{damage}; it is moved to {target}; start again from the step before") from damage

    def _agreed(self, number: int) -> int:
        """Returns the number of process 0, which changes the folder meanwhile."""
        if self._is_alone:
            return number
        return int(multihost_utils.broadcast_one_to_all(np.int32(number)))

    def _retain(self, newest: int) -> None:
        """Deletes all steps but the newest, the last scheduled ones and every `keep_period`-th.

        It waits until the newest is on the disk, and does nothing where a later save has finished by then.
        """
        if newest != self._newest:
            return
        train = self._train
        try:
            with gcs.errors(self._folder):
                steps = saved_steps(self._workdir)
                keep = {s for s in steps if train.keep_period and s % train.keep_period == 0} | {newest}
                keep |= set([s for s in steps if s % train.checkpoint_every == 0][-train.max_to_keep :])
                self._store.sync(str(newest))
                for step in steps:
                    if step not in keep:
                        self._store.delete(str(step))
        except (OSError, UserError, Failure) as e:
            print(f"WARNING: old checkpoints could not be deleted ({e}); the next save will try again", flush=True)

    def close(self) -> None:
        """Waits for the last save and for retention; raises as `save` does."""
        self.wait()
        self._retention.shutdown()
        self._checkpointer.close()
        sys.unraisablehook = self._unraisable_hook
