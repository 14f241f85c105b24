"""A run as `train` steers it: its state, data, evaluations and checkpoints; train.py says what happens when."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from flax_mlm.checkpoint.format import make_meta, stored_run
from flax_mlm.checkpoint.manager import Checkpoints
from flax_mlm.checkpoint.store import saved_steps
from flax_mlm.config import phases
from flax_mlm.data import mixture, pipeline
from flax_mlm.distributed import jax_options
from flax_mlm.distributed.batches import abstract_batch, local_rows, shard_batch
from flax_mlm.distributed.preemption import Stopped
from flax_mlm.errors import Failure
from flax_mlm.evaluation import cloze, mlm
from flax_mlm.hf.folder import open_folder
from flax_mlm.inference.forward import NotFinite
from flax_mlm.inference.load import LoadedModel, start_params
from flax_mlm.objectives.rows import Vocabulary
from flax_mlm.training import extension
from flax_mlm.training.logging import Logger, RunContext, Step
from flax_mlm.training.metrics import Writers
from flax_mlm.training.run_config import FREE, MOVABLE, refuse_other
from flax_mlm.training.state import TrainState, start_phase
from flax_mlm.training.step import build_training


class Diverged(Failure):
    """More updates in a row were skipped than `optimizer.max_skipped_steps` allows, or all updates of a run."""

    code = 2  # launchers do not start again what would diverge again


class Run:
    """A run as one of its processes sees it.

    Attributes:
      state: TrainState after `step` updates.
      step: updates made so far.
      progress: fraction of the run that is done, 0.0 to 1.0.
      phase: index of the phase that the last step belonged to.
      cursor: position of the next batch in its data.
      training_of: the jitted functions of each phase; all phases have the same parameters.
    """

    logger: Logger
    _batches: Generator[dict[str, Any]]

    def __init__(self, context: RunContext):
        """Restores the newest sound checkpoint, else takes the weights of `init_from`, else initialises new ones."""
        self._context, self._programs = context, dict[int, jax.stages.Compiled]()
        self._pending: Step | None = None  # its metrics are not read yet
        self._skipped_in_a_row = 0.0
        self._evaluated, self._calibrated = set[int](), set[int]()  # phases
        mixtures = context.mixtures
        self._tokenizer = mixtures[0].tokenizer()
        self._vocab = Vocabulary.from_tokenizer(self._tokenizer)
        self.training_of = [build_training(p.config, mixtures[0].vocab_size, context.mesh, p) for p in context.phases]
        corpus, text = mixture.fingerprint_of(mixtures), mixture.about_of(mixtures)
        meta = make_meta(context.phases[0].config, self._tokenizer, corpus, text)
        start = open_folder(context.config.init_from).fingerprint() if context.config.init_from else ""
        meta |= {"run": context.config.to_dict(), "start": start}
        self._checkpoints = Checkpoints(context.workdir, context.config, meta, context.group.lost_within)
        saved = saved_steps(context.workdir)[-1:]
        doing = f"restoring step {saved[0]}" if saved else "initialising the model"
        context.log(doing)
        with context.group.untimed(doing):
            restored = self._checkpoints.restore_latest(self.training_of[0].abstract, context.log)
            self.state: TrainState = restored or self._initial_state()
        self.step, self.progress = int(self.state.step), float(self.state.progress)
        if meta := self._checkpoints.restored_meta:
            self._check_restored(meta)
            self.progress = extension.progress_now(meta, self.progress, context.config, context.phases)
            sharding = self.state.progress.sharding
            now = jax.make_array_from_callback((), sharding, lambda _: np.float32(self.progress))
            self.state = self.state._replace(progress=now)
        self.phase, self.cursor = meta.get("phase", 0), mixture.DataCursor(**meta.get("cursor", {}))

    def _check_restored(self, meta: dict[str, Any]) -> None:
        """Raises UserError where a checkpoint is of another run, and Diverged where its run gave up."""
        config, workdir = self._context.config, self._context.workdir
        held = f"--workdir: checkpoint {self.step} in '{workdir}' is of"
        refuse_other(held, stored_run(meta), config, (*FREE, *MOVABLE, *extension.FIELDS))
        if (before := stored_run(meta)["init_from"]) != config.init_from and "hf:" in (
            before[:3],
            config.init_from[:3],
        ):
            self._context.log(
                f"note: the run began from {before}, and init_from is {config.init_from}: the same weights"
            )
        if why := meta.get("gave_up"):
            remedy = f"use another --workdir; delete checkpoints/{self.step} to go on from the step before it"
            raise Diverged(f"'{workdir}' holds a run that gave up at step {self.step}: {why}; {remedy}")
        if changed := jax_options.differences(meta.get("environment", {}), jax_options.recorded()):
            effect = f"from step {self.step} on, numbers may differ in their last bits from those of an undisturbed run"
            self._context.log(f"note: {'; '.join(changed)}: {effect}")

    def _initial_state(self) -> TrainState:
        config, training = self._context.phases[0].config, self.training_of[0]
        state = training.init()
        if config.init_from:
            params = start_params(config, state.params, training.forward.model.dims, self._tokenizer, self._context.log)
            return training.init(params)
        return state

    @property
    def is_over(self) -> bool:
        return phases.is_over(self._context.phases, self.step, self.progress)

    @property
    def next_phase(self) -> int:
        """Index of the phase that the next step belongs to."""
        return phases.index_at(self._context.phases, self.step, self.progress)

    def model(self) -> LoadedModel:
        """The model as it is now, with the config of the last step."""
        config, forward = self._context.phases[self.phase].config, self.training_of[self.phase].forward
        return LoadedModel(config, self._context.mesh, forward, self.state.weights, self._tokenizer, self._vocab)

    def compile(self) -> list[Any]:
        """Compiles the steps of all phases to come: one that does not compile or fit into memory is known now.

        Returns:
          Memory statistics of each, where the backend has them.
        """
        for phase in range(self.next_phase, len(self._context.phases)):
            train, seq_len = self._context.phases[phase].config.train, self._context.mixtures[phase].seq_len
            batch = abstract_batch(train.global_batch_size, seq_len, self._context.mesh, train.budget_minutes > 0)
            with self._context.group.untimed("compiling"):
                lowered = self.training_of[phase].step.lower(self.training_of[0].abstract, batch, self._vocab)
                self._programs[phase] = lowered.compile()
        return [memory for program in self._programs.values() if (memory := program.memory_analysis())]

    def begin(self, writers: Writers | None) -> None:
        """Starts the budget's clock and the data pipeline. `writers` are those of process 0."""
        self.logger = Logger(self._context, writers, self._checkpoints.restored_meta)
        if self._context.budget:
            self._context.budget.progress = self.progress
        self._times_next_save = self._context.config.train.budget_minutes > 0
        self._open_batches()

    def _open_batches(self) -> None:
        """Opens the batches from the cursor on: a function of (corpora, seed, cursor), without a state to save."""
        data, size = self._context.mixtures[self.phase], self._context.phases[self.phase].config.train.global_batch_size
        self._batches = pipeline.train_batches(
            data.split("train"),
            seed=self._context.config.seed,
            global_batch_size=size,
            first_row=self.cursor.row,
            local_rows=local_rows(self._context.mesh, size),
            stream=self.cursor.stream(data),
        )

    def start_phase(self) -> None:
        """Turns to the phase of the next step."""
        before, after = self._context.mixtures[self.phase], self._context.mixtures[self.next_phase]
        if after is not before:
            self.cursor = self.cursor.leaving(before)
        trained = max(data.seq_len for data in self._context.mixtures[: self.next_phase])
        if self._context.config.init_from:  # a folder has trained positions for all lengths
            trained = self._context.config.model.max_positions
        self.state = start_phase(self.state, trained, after.seq_len)
        self.phase = self.next_phase
        self._batches.close()
        self._open_batches()

    def make_step(self) -> None:
        """Makes one step.

        ORDER MATTERS: step n is dispatched before the metrics of step n - 1 are read, so that the devices never wait
        for the host. Where the state is needed next, for a checkpoint or an evaluation, step n is read as well.

        Raises:
          Stopped: a signal has come, on whichever process.
          Diverged: too many updates in a row were skipped.
        """
        previous, self._pending = self._pending, self._dispatch()
        metrics = [self._read(previous)] if previous else []
        t = self._context.config.train
        is_pause = self.save_is_due or any(is_multiple(self.step, n) for n in (t.eval_every, t.cloze_every))
        if is_pause or any(map(self._end, metrics)):
            metrics.append(self._read(self._pending))
            self._pending = None
        for values in reversed(metrics):
            if end := self._end(values):
                raise end

    def _dispatch(self) -> Step:
        """Starts the next update on the devices."""
        context, clock, progress, ended = self._context, self.logger.speed.now, None, None
        context.group.progress("waiting for a batch", self.step)
        began = clock()
        rows = next(self._batches)
        waited = clock() - began
        if context.config.train.budget_minutes:
            progress = context.budget.next_progress() if context.budget else 0.0
        batch = shard_batch(rows, context.mesh, context.stop.requested, progress)
        context.group.progress("training", self.step)
        self.state, metrics = self._programs[self.phase](self.state, batch, self._vocab)
        if jax.default_backend() == "cpu":
            jax.block_until_ready(metrics)  # simulated devices deadlock when steps queue up
            ended = clock()
        self.step += 1
        self.cursor = dataclasses.replace(self.cursor, row=self.cursor.row + len(batch["tokens"]))
        return Step(self.step, self.phase, self.cursor, metrics, waited, ended)

    def _read(self, step: Step) -> dict[str, float]:
        """Waits for a step, and logs its metrics."""
        values = self.logger.train(step, self.training_of[step.phase].flops)
        self.progress, self._skipped_in_a_row = values["progress"], values["skipped_in_a_row"]
        return values

    def _end(self, values: dict[str, float]) -> Diverged | Stopped | None:
        """The exception that ends the run after a step with these metrics."""
        in_a_row, limit = values["skipped_in_a_row"], self._context.config.optimizer.max_skipped_steps
        if in_a_row >= limit or (self.is_over and in_a_row == self.step):
            what = f"{in_a_row:.0f} steps in a row had a non-finite loss or gradient, or a spike"
            state = f"their updates were skipped, and step {self.step} is saved"
            return Diverged(f"{what}; {state}. Try a lower optimizer.learning_rate")
        return Stopped() if values["stop"] else None

    @property
    def save_is_due(self) -> bool:
        """True if the state is to be saved now: on schedule, at the end, or once to learn what time a save takes."""
        every = self._context.config.train.checkpoint_every
        return self.is_over or self._times_next_save or is_multiple(self.step, every)

    def save(self, is_last: bool = False, gave_up: str = "") -> None:
        """Starts saving the state. The last save of a run is waited for, and tried again where it fails.

        Args:
          gave_up: why the run ends here for good; empty for a run that may go on.

        Raises:
          Failure: saves fail again and again.
        """
        context = self._context
        if self._pending:
            self._read(self._pending)
            self._pending = None
        waits = is_last or self._times_next_save
        self._times_next_save = False

        def before() -> None:
            assert context.lease and self.logger.writers, "process 0 calls it"
            context.lease.check()
            self.logger.writers.flush()

        def is_saved() -> bool:
            is_started = self._checkpoints.save(self.step, self.state, before, prunes, **run_meta)
            return is_started and (not waits or self._checkpoints.wait())

        prunes = not gave_up and self._skipped_in_a_row == 0  # a run that diverges keeps what was before
        config = context.phases[self.phase].config
        train = dataclasses.replace(config.train, phases=context.config.train.phases)
        run_meta = {
            "config": dataclasses.replace(config, train=train).to_dict(),
            **self.logger.saved(),
            "phase": self.phase,
            "progress": self.progress,
            "cursor": dataclasses.asdict(self.cursor),
            **({"gave_up": gave_up} if gave_up else {}),
            **(context.budget.cut() if context.budget else {}),
            "environment": jax_options.recorded(),
        }
        with self.logger.pause("saving" if waits else "handing over what to save"), context.group.untimed("saving"):
            while not is_saved() and is_last:
                time.sleep(1)  # the manager gives up after `train.max_failed_saves`

    def evaluate(self) -> dict[str, float]:
        """Measures loss and accuracy on held-out rows (see `evaluation.mlm.run`), and logs them.

        Raises:
          Stopped: a signal has come, on whichever process.
          NotFinite: the model computes NaN or infinity.
        """
        group, data, model = self._context.group, self._context.mixtures[self.phase], self.model()

        def must_stop() -> bool:
            group.progress("evaluating", self.step)
            return self._context.stop.requested

        if self.phase not in self._evaluated:  # one batch compiles, which may take any time
            self._context.log("compiling   the evaluation")
            with group.untimed("compiling"), self.logger.pause("compiling"), contextlib.suppress(Stopped):
                mlm.run(model, data, lambda: True)
            self._evaluated.add(self.phase)
        with self.logger.pause("evaluating"):
            result = mlm.run(model, data, must_stop)
        if self._context.budget:
            result |= self._context.budget.cut()
        self.logger.validation(self.step, self.progress, result)
        return result

    def attempt(self, evaluation: Callable[[], Any]) -> None:
        """Evaluates, and only says so where the model computes NaN or infinity: `Diverged` ends a run if that lasts."""
        try:
            evaluation()
        except NotFinite as e:
            self._context.log(f"step {self.step} is not evaluated: {e}")

    def calibrate_budget(self) -> None:
        """Evaluates once in each phase of a run with a budget, to learn what time its last evaluation will take."""
        if self._context.config.train.budget_minutes and self.phase not in self._calibrated:
            self._calibrated.add(self.phase)
            if self._context.budget:
                self._context.budget.forget("evaluating")
            self.attempt(self.evaluate)

    def evaluate_clozes(self) -> None:
        """Ranks the answers of the built-in clozes, which a person can read, and logs the ranks."""
        report_progress = functools.partial(self._context.group.progress, "filling clozes", self.step)
        report_progress()
        model = self.model()
        if clozes := cloze.fitting(model, cloze.BUILT_IN):
            with self.logger.pause("filling clozes"):
                result = cloze.run(model, clozes, report_progress)
            self.logger.clozes(self.step, self.progress, result, "\n\n".join(cloze.table(result)))

    def close(self) -> None:
        """Ends the data pipeline, and waits for the last save. Raises Failure."""
        self._batches.close()
        self._checkpoints.close()


def is_multiple(step: int, every: int) -> bool:
    """True if something done every `every` steps (0: never) is due after `step` steps."""
    return every > 0 and step > 0 and step % every == 0
