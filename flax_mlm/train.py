"""Command: the run, told from top to bottom.

    python -m flax_mlm.train --config=configs/quickstart.py --workdir=runs/quickstart

The same line starts a run, continues one that was killed, and says of a finished one that it is finished.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from absl import flags
from rich.progress import Progress

from flax_mlm import buckets, claim, command, console, files, phases, preemption, processes
from flax_mlm.budget import Budget
from flax_mlm.config import Config, flatten
from flax_mlm.errors import PREEMPTED, Failure, UserError

_WORKDIR = flags.DEFINE_string(
    "workdir", "", "folder of the run, or gs://BUCKET/FOLDER: checkpoints, metrics.jsonl, config.json"
)

flags.adopt_module_key_flags(processes)

_ADVICE = "Try a lower optimizer.learning_rate"


def train(config: Config, workdir: buckets.AnyPath) -> int:
    """Trains, saves, evaluates. Returns the exit code."""
    stop = preemption.Stop()

    import jax  # heavy imports wait until flags and config are known to be right

    from flax_mlm import checkpoint, chips, lease, masking, metrics, sharding
    from flax_mlm.data import mixture
    from flax_mlm.data.pipeline import train_batches
    from flax_mlm.data.stream import Place
    from flax_mlm.hf import start
    from flax_mlm.prepare import open_corpora
    from flax_mlm.step import TrainState, at_phase, make_steps
    from flax_mlm.tasks import cloze, mlm, rtd
    from flax_mlm.trained import Trained

    identity = {"jax": jax.__version__, **flatten(config.to_dict())}
    with processes.join(identity, config.train.stall_timeout) as roster, contextlib.ExitStack() as at_exit:
        # The devices of all processes, checked before any work is done.
        parts, has_budget = phases.of(config), config.train.has_budget
        mesh = sharding.make_mesh(config.mesh)
        for t in (part.config.train for part in parts):
            sharding.check_batch("train.global_batch_size", t.global_batch_size, mesh, t.microbatches)
        sharding.check_batch("eval.batch_size", config.eval.batch_size, mesh)
        if config.train.reproducible:
            sharding.check_batch("train.batch_groups", config.train.batch_groups, mesh)
        at_exit.enter_context(jax.set_mesh(mesh))
        devices = mesh.devices.flat[:]
        at_exit.enter_context(buckets.errors(workdir))
        buckets.check("--workdir", workdir)

        # The folder, to which the first process alone writes, and the text of one corpus or several, as rows of tokens.
        is_main, log = roster.index == 0, print if roster.index == 0 else lambda *_: None
        stop.leave = lambda reason: roster.leave(PREEMPTED, reason)
        if is_main:
            held = lease.Lease(workdir, roster.run_id)
            at_exit.callback(held.release)
            roster.at_leave(held.release)
            held.take(log)
        with roster.untimed("opening the corpus"):
            mixtures = open_corpora([part.config for part in parts], log)
        fingerprint = mixture.fingerprint_of(mixtures)
        roster.check_same("corpus", fingerprint)
        roster.check_same("--workdir", lease.holder(workdir))
        clock = None
        if is_main:
            claim.take(workdir, config)
            if has_budget:
                clock = Budget(workdir, config.train.seconds(chips.count(devices)))
                at_exit.callback(clock.close)
        parts = phases.settled(parts, [c.seq_len for c in mixtures], [c.tokens_per_row for c in mixtures])
        tokenizer = mixtures[0].tokenizer()

        # The model and its optimizer: from the newest sound checkpoint, from a Hugging Face folder, or new.
        # Phases differ in much, but not in their parameters.
        steps_of = [make_steps(part.config, mixtures[0].vocab_size, mesh, part) for part in parts]
        steps = steps_of[0]

        def new_state() -> TrainState:
            return start.state(parts[0].config, steps, tokenizer, log) if config.init_from else steps.init()

        vocab = masking.vocabulary(tokenizer)
        meta = checkpoint.make_meta(parts[0].config, tokenizer, fingerprint, mixture.about_of(mixtures))
        checkpoints = checkpoint.Checkpoints(workdir, config, meta, steps.fingerprint)
        with roster.untimed("restoring"):
            state = checkpoints.restore_latest(steps.abstract, log) or new_state()
        step, progress = int(state.step), float(state.progress)
        now = checkpoints.so_far.get("phase", 0)  # the phase that the last step was of
        place = Place(**checkpoints.so_far.get("place", {}))

        def trained() -> Trained:
            """The model as it is now, with the config of the last step."""
            return Trained(parts[now].config, mesh, steps_of[now], state.weights, tokenizer, vocab)

        @functools.cache
        def program(phase: int) -> jax.stages.Compiled:
            """The compiled step of a phase."""
            with roster.untimed("compiling"):
                size = parts[phase].config.train.global_batch_size
                rows = sharding.abstract_batch(size, mixtures[phase].seq_len, mesh, has_budget)
                return steps_of[phase].train.lower(steps.abstract, rows, vocab).compile()

        result_file = workdir / "result.json"
        if phases.is_over(parts, step, progress) and result_file.exists():
            if is_main:
                print(f"this run is finished: {step} steps are done")
                console.summary(workdir, trained(), json.loads(result_file.read_text()))
            return 0
        # All that are to come, so that one that does not compile or fit is known now.
        to_come = range(phases.number(parts, step, progress), len(parts))
        memory = [m for i in to_come if (m := program(i).memory_analysis())]  # where it is known
        if is_main:
            result_file.unlink(missing_ok=True)
            console.banner(parts, mixtures, mesh, steps, memory)
            writers = metrics.Writers(workdir, config, step)
            at_exit.callback(writers.close)
        totals = checkpoints.so_far.get("totals", {})
        speed = metrics.Throughput(progress, chips.peak_flops(devices), totals)
        if clock:
            clock.progress = progress

        def batches_from(place: Place) -> Generator[dict[str, Any]]:
            """A function of (corpora, seed, place), so that there is no iterator to save."""
            return train_batches(
                mixtures[now].split("train"),
                seed=config.seed,
                global_batch_size=parts[now].config.train.global_batch_size,
                first_row=place.row,
                process_index=roster.index,
                process_count=roster.count,
                stream=place.stream(mixtures[now]),
            )

        batches = batches_from(place)

        def said(step: int, progress: float) -> str:
            """The beginning of a line."""
            total = f"~{max(step, round(step / max(progress, 1e-9)))}" if has_budget else parts[-1].config.train.steps
            return f"step {step}/{total}"

        def epochs(place: Place, corpus: mixture.Mixture) -> dict[str, float]:
            """How often each of several corpora has been gone through."""
            done = place.stream(corpus).epochs(place.row)
            return {f"epochs/{name}": n for name, n in zip(corpus.corpora, done, strict=True)} if len(done) > 1 else {}

        def read(step: int, phase: int, place: Place, values: dict[str, jax.Array]) -> dict[str, Any]:
            """Takes a step's numbers from the devices, and logs them when it is time."""
            host = {name: float(value) for name, value in jax.device_get(values).items()}
            speed.add(host["tokens"], steps_of[phase].flops)
            if is_main and (step % config.train.log_every == 0 or phases.is_over(parts, step, host["progress"])):
                line = {name: value for name, value in host.items() if name != "stop"} | {"rows": place.row}
                line |= speed.report(host["progress"]) | epochs(place, mixtures[phase])
                print(metrics.train_line(said(step, host["progress"]), line), flush=True)
                writers.write(step, "train", line)
            return {**host, "step": step, "phase": phase, "place": place}

        @contextlib.contextmanager
        def pause(what: str) -> Generator[None]:
            """Around what is no step."""
            with speed.paused(), clock.pause(what) if clock else contextlib.nullcontext():
                yield

        def measured(poll: Callable[[], bool]) -> dict[str, float]:
            """The held-out loss, and more."""
            task = rtd if parts[now].config.objective.name == "rtd" else mlm
            return task.run(trained(), mixtures[now], poll)

        def evaluate() -> dict[str, float]:
            def poll() -> bool:
                roster.progress("evaluating", step)
                return stop.requested

            with pause("evaluating"):
                result = measured(poll)
            if is_main:
                each = "".join(f"  {name} {result[f'loss/{name}']:.4f}" for name in mlm.of_each(result))
                loss, accuracy = f"{result['loss']:.4f}", f"{result['accuracy']:.4f}"
                print(f"{said(step, progress)}  validation loss {loss}  accuracy {accuracy}{each}")
                used = {"budget_seconds": clock.used()} if clock else {}
                writers.write(step, "validation", result | speed.totals() | used)
                writers.flush()
            return result

        def time_evaluation() -> None:
            """First one batch, to compile; so that a budget knows what the last evaluation will take."""
            if clock:
                clock.forget("evaluating")
            with contextlib.suppress(preemption.Stopped), roster.untimed("compiling"), speed.paused():
                measured(lambda: True)
            evaluate()

        def look() -> None:
            """Puts the built-in clozes to the model, so that a person sees what it knows by now."""
            roster.progress("filling clozes", step)
            model = trained()
            if not (clozes := cloze.fitting(model, cloze.BUILT_IN)):
                return
            with pause("filling clozes"):
                result = cloze.run(model, clozes, lambda: roster.progress("filling clozes", step))
            if is_main:
                numbers = {name: value for name, value in result.items() if name != "answers"}
                ranks = f"top1 {result['top1']:.2f}  top5 {result['top5']:.2f}"
                print(f"{said(step, progress)}  clozes  {ranks}", flush=True)
                writers.write(step, "cloze", numbers, "\n\n".join(cloze.table(result)))

        def before_save() -> None:
            held.check()
            writers.flush()

        def save(waits: bool = False, is_last: bool = False) -> None:
            def is_done() -> bool:
                started = checkpoints.save(step, state, before_save, so_far)
                return started and (not (waits or is_last) or checkpoints.wait())

            told = dataclasses.replace(parts[now].config.train, phases=config.train.phases)
            so_far = {
                "config": dataclasses.replace(parts[now].config, train=told).to_dict(),
                **{"totals": speed.totals(), "phase": now, "place": place.to_dict()},
            }
            with pause("saving" if waits else "handing over what to save"), roster.untimed("saving"):
                while not is_done() and is_last:
                    time.sleep(1)  # and again, for this is the last occasion; it gives up by itself

        def enter(phase: int) -> None:
            """Turns to another phase: the next, or when the run has gone back to an earlier one."""
            nonlocal now, place, state, batches
            if mixtures[phase] is not mixtures[now]:
                place = place.turned(mixtures[now])
            if phase > now:
                had = max(corpus.seq_len for corpus in mixtures[:phase])
                trained_positions = config.model.max_positions if config.init_from else had  # a folder has them all
                state = at_phase(state, trained_positions, mixtures[phase].seq_len)
            now = phase
            batches.close()
            batches = batches_from(place)

        def rewind(seen: dict[str, Any]) -> None:
            """Takes up the last scheduled checkpoint before a spike, to go on from with the rows after it."""
            nonlocal now, state, step, progress, place
            spiked, now = seen["step"], seen["phase"]
            checkpoints.wait()
            with roster.untimed("restoring"):
                state = checkpoints.restore_latest(steps.abstract, log, before=spiked) or new_state()
            step, progress, place = int(state.step), float(state.progress), seen["place"]
            rewinds[step] += 1
            if rewinds[step] > config.optimizer.max_skipped_steps:
                raise Failure(
                    f"the loss spikes again and again after step {step}, the last time at {spiked}. {_ADVICE}"
                )
            if is_main:
                print(f"the loss spiked at step {spiked}: back to step {step}, on with row {place.row}", flush=True)
                writers.go_back(step)
                writers.write(step, "rewind", {"from_step": spiked, "rows": place.row})
            if clock:
                clock.progress = progress
            enter(checkpoints.so_far.get("phase", 0) if step else 0)

        def must_rewind(seen: dict[str, Any]) -> bool:
            return config.optimizer.spike_action == "rewind" and seen["spike"] > 0

        def must_end(seen: dict[str, Any]) -> bool:
            return seen["skipped_in_a_row"] >= config.optimizer.max_skipped_steps

        # ORDER MATTERS: dispatch step n, only then read step n - 1, so that the devices never wait for us.
        unread, rewinds, first = None, collections.Counter[int](), step + 1
        progress_bar = at_exit.enter_context(Progress(disable=not (is_main and sys.stdout.isatty())))
        bar = progress_bar.add_task("training", total=1.0)
        stop.hold()
        try:
            if has_budget and not phases.is_over(parts, step, progress):
                time_evaluation()
            while not phases.is_over(parts, step, progress):
                if is_multiple(step, config.train.eval_every):
                    evaluate()
                if is_multiple(step, config.train.cloze_every):
                    look()
                if (phase := phases.number(parts, step, progress)) != now:
                    enter(phase)
                    if has_budget:
                        time_evaluation()
                roster.progress("waiting for a batch", step)
                with speed.waiting():
                    rows = next(batches)
                share = (clock.next_progress() if clock else 0.0) if has_budget else None
                batch = sharding.global_batch(rows, mesh, stop.requested, share)
                roster.progress("training", step)
                state, values = program(now)(state, batch, vocab)
                if jax.default_backend() == "cpu":
                    jax.block_until_ready(values)  # simulated devices deadlock when steps queue up
                seen: dict[str, Any] = dict.fromkeys(values, 0.0) | {"progress": progress}
                if unread:
                    seen = read(*unread)
                step, progress = step + 1, seen["progress"]
                place = place._replace(row=place.row + len(batch["tokens"]))
                unread = step, now, place, values
                progress_bar.update(bar, completed=progress)

                times_save = has_budget and step == first  # the last one has to fit into the budget, too
                is_due = times_save or is_multiple(step, config.train.checkpoint_every)
                is_pause = (
                    is_due
                    or phases.is_over(parts, step, progress)
                    or any(is_multiple(step, every) for every in (config.train.eval_every, config.train.cloze_every))
                )
                ends = must_end(seen)
                if not must_rewind(seen) and (is_pause or seen["stop"] or ends):
                    seen, unread = read(*unread), None
                    progress = seen["progress"]
                if must_rewind(seen):
                    rewind(seen)
                    unread = None
                elif ends or must_end(seen):
                    save(is_last=True)
                    raise Failure(
                        f"{config.optimizer.max_skipped_steps} steps in a row had a non-finite loss or gradient, or a "
                        f"spike; their updates were skipped, and step {step} is saved. {_ADVICE}"
                    )
                elif seen["stop"]:
                    raise preemption.Stopped
                elif is_due or phases.is_over(parts, step, progress):
                    save(times_save, is_last=phases.is_over(parts, step, progress))
        except preemption.Stopped:
            save(is_last=True)
            log(f"stopped by a signal; step {step} is saved. The same command goes on from there")
            return PREEMPTED
        stop.release()
        batches.close()
        checkpoints.close()

        with roster.untimed("evaluating"):
            result = evaluate()
        if is_main:
            files.write_json(result_file, result)
            console.summary(workdir, trained(), result)
    return 0


def is_multiple(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is due."""
    return every > 0 and step > 0 and step % every == 0


def main(config: Config) -> int:
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name a folder for the run, such as --workdir=runs/first")
    bucket = buckets.parse("--workdir", _WORKDIR.value)
    return train(config, bucket or Path(_WORKDIR.value).expanduser().absolute())


if __name__ == "__main__":
    command.run(main)
