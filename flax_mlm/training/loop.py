"""A run between its steps: what it is by now, and what is done with it besides training; train.py tells when."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh

from flax_mlm.checkpoint.format import make_meta
from flax_mlm.checkpoint.manager import Checkpoints
from flax_mlm.config import phases
from flax_mlm.config.schema import Config
from flax_mlm.data import mixture
from flax_mlm.data.mixture import DataCursor
from flax_mlm.data.pipeline import train_batches
from flax_mlm.distributed import chips
from flax_mlm.distributed.batches import abstract_batch, local_rows, shard_batch
from flax_mlm.distributed.preemption import Stop, Stopped
from flax_mlm.distributed.processes import ProcessGroup
from flax_mlm.errors import Failure
from flax_mlm.evaluation import cloze, mlm, rtd
from flax_mlm.inference.load import LoadedModel, start_params
from flax_mlm.objectives.vocabulary import Vocabulary
from flax_mlm.storage import gcs
from flax_mlm.storage.lease import Lease
from flax_mlm.training import metrics
from flax_mlm.training.budget import Budget
from flax_mlm.training.step import TrainState, at_phase, make_steps

_ADVICE = "Try a lower optimizer.learning_rate"


class Run:
    """One run, as one of its processes sees it.

    Attributes:
      state: the parameters, and what belongs to them.
      step: the number of updates that were made.
      progress: the share of the run that is done.
      phase: the number of the one that the last step was of.
      place: that of the next batch in its text.
      steps_of: the jitted functions of each phase; what they have in common are the parameters.
    """

    _speed: metrics.Throughput
    _batches: Generator[dict[str, Any]]

    def __init__(
        self,
        config: Config,
        workdir: gcs.AnyPath,
        parts: list[phases.Phase],
        mixtures: list[mixture.Mixture],
        mesh: Mesh,
        group: ProcessGroup,
        stop: Stop,
        log: Callable[[str], None],
        held: Lease | None,
        clock: Budget | None,
    ):
        """From the newest sound checkpoint, from a Hugging Face folder, or new.

        Args:
          parts: the phases of `config`.
          mixtures: the text of each.
          held: the right to write to the folder, which the first process has.
          clock: of a run with a budget, likewise.
        """
        self._config, self._parts, self._mixtures, self._mesh = config, parts, mixtures, mesh
        self._roster, self._stop, self._log, self._held, self._clock = group, stop, log, held, clock
        self._writers: metrics.Writers | None = None
        self._programs: dict[int, jax.stages.Compiled] = {}
        self._evaluated = set[int]()
        self._tokenizer = mixtures[0].tokenizer()
        self._vocab = Vocabulary.from_tokenizer(self._tokenizer)
        self.steps_of = [make_steps(part.config, mixtures[0].vocab_size, mesh, part) for part in parts]
        about, fingerprint = mixture.about_of(mixtures), mixture.fingerprint_of(mixtures)
        meta = make_meta(parts[0].config, self._tokenizer, fingerprint, about)
        self._checkpoints = Checkpoints(workdir, config, meta, self.steps_of[0].fingerprint, group.lost_within)
        with group.untimed("restoring"):
            restored = self._checkpoints.restore_latest(self.steps_of[0].abstract, log)
            self._take(restored or self._new_state())
        restored_meta = self._checkpoints.restored_meta
        self.phase, self.place = restored_meta.get("phase", 0), DataCursor(**restored_meta.get("cursor", {}))

    def _new_state(self) -> TrainState:
        steps, config = self.steps_of[0], self._parts[0].config
        state = steps.init()
        if config.init_from:
            params = start_params(config, state.params, steps.model.dims, self._tokenizer, self._log)
            return steps.init(params)
        return state

    def _take(self, state: TrainState) -> None:
        self.state, self.step, self.progress = state, int(state.step), float(state.progress)

    @property
    def is_over(self) -> bool:
        return phases.is_over(self._parts, self.step, self.progress)

    @property
    def next_phase(self) -> int:
        """The number of the one that the next step is of."""
        return phases.index_at(self._parts, self.step, self.progress)

    def trained(self) -> LoadedModel:
        """The model as it is now, with the config of the last step."""
        part, steps = self._parts[self.phase], self.steps_of[self.phase]
        return LoadedModel(part.config, self._mesh, steps, self.state.weights, self._tokenizer, self._vocab)

    def compile(self) -> list[Any]:
        """All phases that are to come, so that one that does not compile or fit is known now.

        Returns:
          What memory each takes, where it is known.
        """
        to_come = range(self.next_phase, len(self._parts))
        return [memory for i in to_come if (memory := self._program(i).memory_analysis())]

    def _program(self, phase: int) -> jax.stages.Compiled:
        """The compiled step of a phase."""
        if phase not in self._programs:
            with self._roster.untimed("compiling"):
                size = self._parts[phase].config.train.global_batch_size
                seq_len, has_budget = self._mixtures[phase].seq_len, self._config.train.has_budget
                rows = abstract_batch(size, seq_len, self._mesh, has_budget)
                lowered = self.steps_of[phase].train.lower(self.steps_of[0].abstract, rows, self._vocab)
                self._programs[phase] = lowered.compile()
        return self._programs[phase]

    def begin(self, writers: metrics.Writers | None) -> None:
        """Starts the clocks. `writers` are those of the first process."""
        self._writers = writers
        totals = self._checkpoints.restored_meta.get("totals", {})
        self._speed = metrics.Throughput(self.progress, chips.peak_flops(self._mesh.devices.flat[:]), totals)
        if self._clock:
            self._clock.progress = self.progress
        self._batches = self._batches_from_here()

    def _batches_from_here(self) -> Generator[dict[str, Any]]:
        """A function of (corpora, seed, place), so that there is no iterator to save."""
        corpus, size = self._mixtures[self.phase], self._parts[self.phase].config.train.global_batch_size
        return train_batches(
            corpus.split("train"),
            seed=self._config.seed,
            global_batch_size=size,
            first_row=self.place.row,
            local_rows=local_rows(self._mesh, size),
            stream=self.place.stream(corpus),
        )

    def enter(self, phase: int) -> None:
        """Turns to the next phase."""
        before, after = self._mixtures[self.phase], self._mixtures[phase]
        if after is not before:
            self.place = self.place.leaving(before)
        had = max(corpus.seq_len for corpus in self._mixtures[:phase])
        trained = self._config.model.max_positions if self._config.init_from else had  # a folder has them all
        self.state = at_phase(self.state, trained, after.seq_len)
        self.phase = phase
        self._batches.close()
        self._batches = self._batches_from_here()

    def next_batch(self) -> dict[str, jax.Array]:
        """That of all processes, with whether one is to stop and how far it takes the run, where the clock decides."""
        self._roster.progress("waiting for a batch", self.step)
        with self._speed.waiting():
            rows = next(self._batches)
        share = None
        if self._config.train.has_budget:
            share = self._clock.next_progress() if self._clock else 0.0
        return shard_batch(rows, self._mesh, self._stop.requested, share)

    def update(self, batch: dict[str, jax.Array]) -> Callable[[], dict[str, Any]]:
        """One step. Returns a function that waits for it, and tells of it (see `_read`)."""
        self._roster.progress("training", self.step)
        self.state, values = self._program(self.phase)(self.state, batch, self._vocab)
        if jax.default_backend() == "cpu":
            jax.block_until_ready(values)  # simulated devices deadlock when steps queue up
        self.step += 1
        self.place = self.place._replace(row=self.place.row + len(batch["tokens"]))
        step, phase, place = self.step, self.phase, self.place
        return lambda: self._read(step, phase, place, values)

    def _read(self, step: int, phase: int, place: DataCursor, values: dict[str, jax.Array]) -> dict[str, Any]:
        """Takes a step's numbers from the devices, and logs them when it is time."""
        host = {name: float(value) for name, value in jax.device_get(values).items()}
        self.progress = host["progress"]
        self._speed.add(host["tokens"], self.steps_of[phase].flops)
        is_last = phases.is_over(self._parts, step, self.progress)
        if self._writers and (step % self._config.train.log_every == 0 or is_last):
            line = {name: value for name, value in host.items() if name != "stop"} | {"rows": place.row}
            line |= self._speed.report(self.progress) | _epochs(place, self._mixtures[phase])
            print(metrics.train_line(self._said(step), line), flush=True)
            self._writers.write(step, "train", line)
        return {**host, "step": step, "phase": phase, "place": place}

    def _said(self, step: int) -> str:
        """The beginning of a line."""
        total: Any = self._parts[-1].config.train.steps
        if self._config.train.has_budget:
            total = f"~{max(step, round(step / max(self.progress, 1e-9)))}"
        return f"step {step}/{total}"

    @contextlib.contextmanager
    def _pause(self, what: str) -> Generator[None]:
        """Around what is no step."""
        with self._speed.paused(), self._clock.pause(what) if self._clock else contextlib.nullcontext():
            yield

    def _measured(self, poll: Callable[[], bool]) -> dict[str, float]:
        """The held-out loss, and more."""
        task = rtd if self._parts[self.phase].config.objective.name == "rtd" else mlm
        return task.run(self.trained(), self._mixtures[self.phase], poll)

    def evaluate(self) -> dict[str, float]:
        """Measures on held-out text. Raises Stopped."""

        def poll() -> bool:
            self._roster.progress("evaluating", self.step)
            return self._stop.requested

        if self.phase not in self._evaluated:  # first one batch, to compile, which may take any time
            with self._roster.untimed("compiling"), self._pause("compiling"), contextlib.suppress(Stopped):
                self._measured(lambda: True)
            self._evaluated.add(self.phase)
        with self._pause("evaluating"):
            result = self._measured(poll)
        if self._writers:
            each = "".join(f"  {name} {result[f'loss/{name}']:.4f}" for name in mlm.of_each(result))
            loss, accuracy = f"{result['loss']:.4f}", f"{result['accuracy']:.4f}"
            print(f"{self._said(self.step)}  validation loss {loss}  accuracy {accuracy}{each}")
            used = {"budget_seconds": self._clock.used()} if self._clock else {}
            self._writers.write(self.step, "validation", result | self._speed.totals() | used)
            self._writers.flush()
        return result

    def time_evaluation(self) -> None:
        """So that a budget knows what the last evaluation will take."""
        if self._clock:
            self._clock.forget("evaluating")
        self.evaluate()

    def look(self) -> None:
        """Puts the built-in clozes to the model, so that a person sees what it knows by now."""

        def poll() -> None:
            self._roster.progress("filling clozes", self.step)

        poll()
        model = self.trained()
        if not (clozes := cloze.fitting(model, cloze.BUILT_IN)):
            return
        with self._pause("filling clozes"):
            result = cloze.run(model, clozes, poll)
        if self._writers:
            numbers = {name: value for name, value in result.items() if name != "answers"}
            ranks = f"top1 {result['top1']:.2f}  top5 {result['top5']:.2f}"
            print(f"{self._said(self.step)}  clozes  {ranks}", flush=True)
            self._writers.write(self.step, "cloze", numbers, "\n\n".join(cloze.table(result)))

    def save(self, waits: bool = False, is_last: bool = False) -> None:
        """Starts to, and waits for the end of it where asked to. The last occasion is tried again where it fails."""

        def before() -> None:
            assert self._held and self._writers  # it is called by the first process
            self._held.check()
            self._writers.flush()

        def is_done() -> bool:
            started = self._checkpoints.save(self.step, self.state, before, run_meta)
            return started and (not (waits or is_last) or self._checkpoints.wait())

        now = self._parts[self.phase].config
        told = dataclasses.replace(now.train, phases=self._config.train.phases)
        run_meta = {
            "config": dataclasses.replace(now, train=told).to_dict(),
            **{"totals": self._speed.totals(), "phase": self.phase, "cursor": self.place.to_dict()},
        }
        with self._pause("saving" if waits else "handing over what to save"), self._roster.untimed("saving"):
            while not is_done() and is_last:
                time.sleep(1)  # it gives up by itself

    def asks(self, seen: dict[str, Any]) -> str:
        """What a step's numbers ask for: "end" where too many updates in a row were skipped, "stop" after a signal, or
        nothing."""
        if seen.get("skipped_in_a_row", 0) >= self._config.optimizer.max_skipped_steps:
            return "end"
        return "stop" if seen.get("stop") else ""

    def give_up(self) -> NoReturn:
        """Saves what there is. Raises Failure."""
        self.save(is_last=True)
        raise Failure(
            f"{self._config.optimizer.max_skipped_steps} steps in a row had a non-finite loss or gradient, or a spike; "
            f"their updates were skipped, and step {self.step} is saved. {_ADVICE}"
        )

    def close(self) -> None:
        """Waits until the last save is whole. Raises Failure."""
        self._batches.close()
        self._checkpoints.close()


def _epochs(place: DataCursor, corpus: mixture.Mixture) -> dict[str, float]:
    """How often each of several corpora has been gone through."""
    done = place.stream(corpus).epochs(place.row)
    return {f"epochs/{name}": n for name, n in zip(corpus.corpora, done, strict=True)} if len(done) > 1 else {}
