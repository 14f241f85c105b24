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
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from absl import flags
from rich.progress import Progress

from flax_mlm import buckets, claim, command, files, preemption, processes
from flax_mlm.config import Config, flatten
from flax_mlm.errors import Failure, UserError

_WORKDIR = flags.DEFINE_string(
    "workdir", "", "folder of the run, or gs://BUCKET/FOLDER: checkpoints, metrics.jsonl, config.json"
)

flags.adopt_module_key_flags(processes)

_ADVICE = "Try a lower optimizer.learning_rate"


def train(config: Config, workdir: buckets.AnyPath) -> int:
    """Trains, saves, evaluates. Returns the exit code."""
    stop = preemption.Stop()

    import jax  # heavy imports wait until flags and config are known to be right
    import numpy as np

    from flax_mlm import checkpoint, chips, lease, masking, metrics, sharding
    from flax_mlm.data.pipeline import train_batches
    from flax_mlm.hf import start
    from flax_mlm.prepare import open_corpus
    from flax_mlm.step import TrainState, make_steps
    from flax_mlm.tasks import cloze, mlm, rtd
    from flax_mlm.trained import Trained

    identity = {"jax": jax.__version__, **flatten(config.to_dict())}
    with processes.join(identity, config.train.stall_timeout) as roster, contextlib.ExitStack() as at_exit:
        # The devices of all processes, checked before any work is done.
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch("train.global_batch_size", config.train.global_batch_size, mesh, config.train.microbatches)
        sharding.check_batch("eval.batch_size", config.eval.batch_size, mesh)
        if config.train.reproducible:
            sharding.check_batch("train.batch_groups", config.train.batch_groups, mesh)
        at_exit.enter_context(jax.set_mesh(mesh))
        at_exit.enter_context(buckets.errors(workdir))
        buckets.check("--workdir", workdir)

        # The folder, to which the first process alone writes, and the text of one corpus or several, as rows of tokens.
        is_main, log = roster.index == 0, print if roster.index == 0 else lambda *_: None
        stop.leave = lambda reason: roster.leave(command.PREEMPTED, reason)
        if is_main:
            held = lease.Lease(workdir, roster.run_id)
            at_exit.callback(held.release)
            roster.at_leave(held.release)
            held.take(log)
        with roster.untimed("opening the corpus"):
            corpus = open_corpus(config, log)
        roster.check_same("corpus", corpus.fingerprint)
        roster.check_same("--workdir", lease.holder(workdir))
        if is_main:
            claim.take(workdir, config)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=corpus.seq_len))
        tokenizer, stream = corpus.tokenizer(), corpus.stream()

        # The model and its optimizer: from the newest sound checkpoint, from a Hugging Face folder, or new.
        # Phases differ in their objective alone.
        phases = config.phases()
        steps_of = {begin: make_steps(phase, corpus.vocab_size, mesh) for begin, phase in phases.items()}
        steps = steps_of[0]

        def new_state() -> TrainState:
            return start.state(config, steps, tokenizer, log) if config.init_from else steps.init()

        vocab = masking.vocabulary(tokenizer)
        meta = checkpoint.make_meta(config, tokenizer, corpus.fingerprint, corpus.about)
        checkpoints = checkpoint.Checkpoints(workdir, config, meta, steps.fingerprint)
        with roster.untimed("restoring"):
            state = checkpoints.restore_latest(steps.abstract, log) or new_state()
        step, total = int(state.step), config.train.steps

        def phase_at(step: int) -> int:
            """The first step of the phase that update number `step` belongs to."""
            return max(begin for begin in phases if begin <= step)

        def trained_at(step: int) -> Trained:
            """The model after `step` updates, with the objective of the last of them."""
            last = phase_at(max(step - 1, 0))
            return Trained(phases[last], mesh, steps_of[last], state.weights, tokenizer, vocab)

        @functools.cache
        def program(begin: int) -> jax.stages.Compiled:
            """The compiled step of the phase that begins there."""
            with roster.untimed("compiling"):
                rows = sharding.abstract_batch(config.train.global_batch_size, corpus.seq_len, mesh)
                return steps_of[begin].train.lower(steps.abstract, rows, vocab).compile()

        result_file = workdir / "result.json"
        if step == total and result_file.exists():
            if is_main:
                print(f"this run is finished: {total} steps are done")
                print_summary(workdir, trained_at(step), json.loads(result_file.read_text()))
            return 0
        for begin in phases:
            if begin >= phase_at(step):
                program(begin)  # all that are to come, so that one that does not compile or fit is known now
        if is_main:
            result_file.unlink(missing_ok=True)
            print_banner(config, phases, corpus, mesh, steps, program(phase_at(step)).memory_analysis())
            writers = metrics.Writers(workdir, config, step)
            at_exit.callback(writers.close)
        speed = metrics.Throughput(step, total, chips.peak_flops(mesh.devices.flat[:]), checkpoints.totals)

        def batches_from(state: TrainState) -> Generator[dict[str, Any]]:
            """A function of (corpora, seed, step), so that there is no position to restore."""
            return train_batches(
                corpus.split("train"),
                seed=config.seed,
                global_batch_size=config.train.global_batch_size,
                start_step=int(state.data_step),
                stop_step=int(state.data_step) + total - int(state.step),
                process_index=roster.index,
                process_count=roster.count,
                stream=stream,
            )

        def epochs(data_step: float) -> dict[str, float]:
            """How often each of several corpora has been gone through, after so many batches."""
            done = stream.epochs(int(data_step) * config.train.global_batch_size)
            return {f"epochs/{name}": n for name, n in zip(corpus.corpora, done, strict=True)} if len(done) > 1 else {}

        def read(step: int, values: dict[str, jax.Array]) -> dict[str, float]:
            """Takes a step's numbers from the devices, and logs them when it is time."""
            host = {name: float(value) for name, value in jax.device_get(values).items()}
            speed.add(host["tokens"], steps_of[phase_at(step - 1)].flops)
            if is_main and (step % config.train.log_every == 0 or step == total):
                line = {name: value for name, value in host.items() if name != "stop"} | speed.report(step)
                line |= epochs(host["data_step"])
                print(metrics.train_line(step, total, line), flush=True)
                writers.write(step, "train", line)
            return {**host, "step": step}

        def evaluate(trained: Trained) -> dict[str, float]:
            def poll() -> bool:
                roster.progress("evaluating", step)
                return stop.requested

            result = (rtd if trained.config.objective.name == "rtd" else mlm).run(trained, corpus, poll)
            if is_main:
                each = "".join(f"  {name} {result[f'loss/{name}']:.4f}" for name in mlm.of_each(result))
                loss, accuracy = f"{result['loss']:.4f}", f"{result['accuracy']:.4f}"
                print(f"step {step}/{total}  validation loss {loss}  accuracy {accuracy}{each}")
                writers.write(step, "validation", result | speed.totals())
                writers.flush()
            return result

        def look() -> None:
            """Puts the built-in clozes to the model, so that a person sees what it knows by now."""
            roster.progress("filling clozes", step)
            trained = trained_at(step)
            if not (clozes := cloze.fitting(trained, cloze.BUILT_IN)):
                return
            result = cloze.run(trained, clozes)
            if is_main:
                numbers = {name: value for name, value in result.items() if name != "answers"}
                print(f"step {step}/{total}  clozes  top1 {result['top1']:.2f}  top5 {result['top5']:.2f}", flush=True)
                writers.write(step, "cloze", numbers, "\n\n".join(cloze.table(result)))

        def before_save() -> None:
            held.check()
            writers.flush()

        def save(is_last: bool = False) -> None:
            def is_done() -> bool:
                return checkpoints.save(step, state, before_save, totals) and (not is_last or checkpoints.wait())

            totals = speed.totals()
            with speed.paused(), roster.untimed("saving"):
                while not is_done() and is_last:
                    time.sleep(1)  # and again, for this is the last occasion; it gives up by itself

        def rewind(spiked: int, data_step: int) -> TrainState:
            """The last scheduled checkpoint before a spike, to go on from with the batches after it."""
            checkpoints.wait()
            with roster.untimed("restoring"):
                state = checkpoints.restore_latest(steps.abstract, log, before=spiked) or new_state()
            back = int(state.step)
            rewinds[back] += 1
            if rewinds[back] > config.optimizer.max_skipped_steps:
                raise Failure(
                    f"the loss spikes again and again after step {back}, the last time at {spiked}; {_ADVICE}"
                )
            if is_main:
                print(f"the loss spiked at step {spiked}: back to step {back}, on with batch {data_step}", flush=True)
                writers.go_back(back)
                writers.write(back, "rewind", {"from_step": spiked, "data_step": data_step})
            return state._replace(data_step=jax.device_put(np.int32(data_step), state.data_step.sharding))

        def must_rewind(seen: dict[str, float]) -> bool:
            return config.optimizer.spike_action == "rewind" and seen["spike"] > 0

        def must_end(seen: dict[str, float]) -> bool:
            return seen["skipped_in_a_row"] >= config.optimizer.max_skipped_steps

        # ORDER MATTERS: dispatch step n, only then read step n - 1, so that the devices never wait for us.
        batches, unread, rewinds = batches_from(state), None, collections.Counter[int]()
        progress = at_exit.enter_context(Progress(disable=not (is_main and sys.stdout.isatty())))
        bar = progress.add_task("training", total=total)
        stop.hold()
        try:
            while step < total:
                if is_multiple(step, config.train.eval_every):
                    with speed.paused():
                        evaluate(trained_at(step))
                if is_multiple(step, config.train.cloze_every):
                    with speed.paused():
                        look()
                roster.progress("waiting for a batch", step)
                with speed.waiting():
                    batch = sharding.global_batch(next(batches), mesh, stop.requested)
                roster.progress("training", step)
                state, values = program(phase_at(step))(state, batch, vocab)
                if jax.default_backend() == "cpu":
                    jax.block_until_ready(values)  # simulated devices deadlock when steps queue up
                seen = read(*unread) if unread else dict.fromkeys(values, 0.0)
                step += 1
                unread = step, values
                progress.update(bar, completed=step)

                is_due = is_multiple(step, config.train.checkpoint_every) or step == total
                is_pause = is_due or any(
                    is_multiple(step, every) for every in (config.train.eval_every, config.train.cloze_every)
                )
                if not must_rewind(seen) and (is_pause or seen["stop"] or must_end(seen)):
                    seen, unread = read(*unread), None
                if must_rewind(seen):
                    state = rewind(int(seen["step"]), int(seen["data_step"]))
                    batches.close()
                    step, unread, batches = int(state.step), None, batches_from(state)
                elif must_end(seen):
                    save(is_last=True)
                    raise Failure(
                        f"{seen['skipped_in_a_row']:.0f} steps in a row had a non-finite loss or gradient, or a spike; "
                        f"their updates were skipped, and step {step} is saved. {_ADVICE}"
                    )
                elif seen["stop"]:
                    raise preemption.Stopped
                elif is_due:
                    save(is_last=step == total)
        except preemption.Stopped:
            save(is_last=True)
            log(f"stopped by a signal; step {step} is saved. The same command goes on from there")
            return command.PREEMPTED
        stop.release()
        checkpoints.close()

        with speed.paused(), roster.untimed("evaluating"):
            result = evaluate(trained_at(step))
        if is_main:
            files.write_json(result_file, result)
            print_summary(workdir, trained_at(step), result)
    return 0


def is_multiple(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is due."""
    return every > 0 and step > 0 and step % every == 0


def print_banner(config: Config, phases: dict[int, Config], corpus: Any, mesh: Any, steps: Any, memory: Any) -> None:
    """What is about to run, and on what."""
    import jax

    versions = "  ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint"))
    device = mesh.devices.flat[0]
    num_params = sum(x.size for x in jax.tree.leaves(steps.abstract.params))
    batch, total = config.train.global_batch_size, config.train.steps
    epochs = corpus.stream().epochs(batch * total)
    print(f"python {sys.version.split()[0]}  {versions}")
    print(f"devices     {mesh.size} × {device.device_kind} ({device.platform}), {jax.process_count()} process(es)")
    print(f"mesh        {dict(mesh.shape)}")
    print(f"model       {num_params:,} parameters, {steps.flops / batch / corpus.seq_len / 1e6:,.1f} MFLOPs per token")
    print(
        f"memory      {memory.argument_size_in_bytes / 2**20:,.0f} MiB of state and batch on each device, "
        f"{memory.temp_size_in_bytes / 2**20:,.0f} MiB of temporaries"
    )
    for (name, part), times in zip(corpus.corpora.items(), epochs, strict=True):
        print(f"corpus      {part.path} ({part.source})")
        counts, of_several = part.counts["train"], ""
        if len(epochs) > 1:
            of_several = f", {corpus.shares[name]:.1%} of the rows ({times:.2f} epochs)"
        print(
            f"            {counts['rows']:,} rows of {corpus.seq_len}, {counts['tokens']:,} tokens, vocabulary "
            f"{corpus.vocab_size:,}{of_several}"
        )
    first, *others = phases.items()
    average = config.optimizer.averages
    averaged = f" (evaluated: the {average} average of its weights)" if average != "none" else ""
    objectives = [first[1].objective.name, *(f"then from step {i:,} {c.objective.name}" for i, c in others)]
    print(
        f"run         {', '.join(objectives)}, {total:,} steps of {batch} rows = "
        f"{batch * total * corpus.tokens_per_row:,.0f} tokens{f' ({epochs[0]:.1f} epochs)' * (len(epochs) == 1)}, "
        f"{config.optimizer.name}{averaged}",
        flush=True,
    )


def print_summary(workdir: buckets.AnyPath, trained: Any, result: dict[str, float]) -> None:
    """How the run ended, and how to go on."""
    import jax

    from flax_mlm import filler as filler_lib
    from flax_mlm.tasks import mlm, rtd

    objective = trained.config.objective.name
    lines = rtd.table(result) if objective == "rtd" else mlm.table(result, objective)
    print("\n" + "\n".join(lines) + "\n")
    if objective == "mlm" and jax.process_count() == 1:  # one process alone could not ask the model
        filler = filler_lib.Filler(trained)
        for sentence in filler_lib.EXAMPLES:
            with contextlib.suppress(UserError):  # longer than a row
                words = ", ".join(f"{word} {probability:.2f}" for word, probability in filler.top(sentence, 5)[0])
                print(f"{sentence}\n    {words}")
    if workdir.is_relative_to(Path.cwd()):
        workdir = workdir.relative_to(Path.cwd())
    print(f"\nwritten to {workdir}: checkpoints/  metrics.jsonl  config.json  result.json", end="")
    print("  tensorboard/" if trained.config.log.tensorboard else "")
    print("go on with")
    print(f"    python -m flax_mlm.evaluate --checkpoint={workdir} --task=mlm")
    if objective == "mlm":
        print(f'    python -m flax_mlm.fill_mask --checkpoint={workdir} "The [MASK] of the United States."')
    print(f"    python -m flax_mlm.export --checkpoint={workdir} --output=exported")


def main(config: Config) -> int:
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name a folder for the run, such as --workdir=runs/first")
    bucket = buckets.parse("--workdir", _WORKDIR.value)
    return train(config, bucket or Path(_WORKDIR.value).expanduser().absolute())


if __name__ == "__main__":
    command.run(main)
