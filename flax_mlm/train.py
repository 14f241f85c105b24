"""Command: the run, told from top to bottom.

    python -m flax_mlm.train --config=configs/quickstart.py --workdir=runs/quickstart

The same line starts a run, continues one that was killed, and says of a finished one that it is finished.
"""

import contextlib
import dataclasses
import json
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from absl import flags
from rich.progress import track

from flax_mlm import command
from flax_mlm.config import Config
from flax_mlm.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", "", "folder of the run: checkpoints, metrics.jsonl, config.json")

# May differ between a run and its continuation: they change where, how often or how fast, but not what is learned.
_FREE = (
    *("data.cache_dir", "data.num_workers", "model.scan_layers", "model.remat", "train.microbatches"),
    *("train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_last", "train.keep_every"),
    *("eval.", "mesh.", "log."),
)


def train(config: Config, workdir: Path) -> int:
    """Trains, saves, evaluates. Returns the exit code."""
    import jax  # heavy imports wait until flags and config are known to be right

    from flax_mlm import checkpoint, masking, metrics, sharding
    from flax_mlm.data.pipeline import train_batches
    from flax_mlm.prepare import open_corpus
    from flax_mlm.step import make_steps
    from flax_mlm.tasks import mlm
    from flax_mlm.trained import Trained

    # The devices, checked before any work is done.
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch("train.global_batch_size", config.train.global_batch_size, mesh, config.train.microbatches)
    sharding.check_batch("eval.batch_size", config.eval.batch_size, mesh)
    is_main = jax.process_index() == 0
    claim(workdir, config)
    stop = StopSignal()

    # The text, as rows of tokens.
    corpus = open_corpus(config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=corpus.seq_len))
    tokenizer = corpus.tokenizer()

    with jax.set_mesh(mesh):
        # The model and its optimizer, new or from the newest checkpoint.
        steps = make_steps(config, corpus.vocab_size, mesh)
        vocab = masking.vocabulary(tokenizer)
        checkpoints = checkpoint.Checkpoints(
            workdir, config, checkpoint.make_meta(config, tokenizer, corpus.fingerprint)
        )
        restored = checkpoints.restore_latest(steps.abstract, print)
        state = steps.init() if restored is None else restored
        start, total = int(state.step), config.train.steps
        rows = sharding.abstract_batch(config.train.global_batch_size, corpus.seq_len, mesh)
        train_step = steps.train.lower(steps.abstract, rows, vocab).compile()
        if is_main:
            print_banner(config, corpus, mesh, steps, train_step.memory_analysis())
            writers = metrics.Writers(workdir, config, start)

        # The batches: a function of (corpus, seed, step), so there is no position to restore.
        batches = train_batches(
            corpus.split("train"),
            seed=config.seed,
            global_batch_size=config.train.global_batch_size,
            start_step=start,
            stop_step=total,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

        def evaluate(step: int) -> dict[str, float]:
            result = mlm.run(Trained(config, mesh, steps, state.params, tokenizer, vocab), corpus)
            if is_main:
                print(f"step {step}/{total}  validation loss {result['loss']:.4f}  accuracy {result['accuracy']:.4f}")
                writers.write(step, "validation", result)
            return result

        speed = metrics.Throughput(start, total, steps.flops, metrics.peak_flops(mesh))
        bad_in_a_row, previous = 0, None

        def read(step: int, values: dict[str, jax.Array]) -> int:
            """Takes a step's numbers from the devices, logs them when it is time, and returns its count of
            non-finite steps in a row."""
            host = {name: float(value) for name, value in jax.device_get(values).items()}
            speed.add(host["tokens"])
            if is_main and (step % config.train.log_every == 0 or step == total):
                line = {**host, **speed.report(step)}
                print(metrics.train_line(step, total, line), flush=True)
                writers.write(step, "train", line)
            return int(host["skipped_in_a_row"])

        # ORDER MATTERS: dispatch step n, only then read step n - 1, so that the devices never wait for us.
        is_terminal = is_main and sys.stdout.isatty()
        for step in track(range(start + 1, total + 1), "training", total, start, disable=not is_terminal):
            with speed.waiting():
                batch = sharding.global_batch(next(batches), mesh)
            state, values = train_step(state, batch, vocab)
            if jax.default_backend() == "cpu":
                jax.block_until_ready(values)  # simulated devices deadlock when steps queue up
            if previous is not None:
                bad_in_a_row = read(*previous)
            previous = step, values
            due = step % config.train.checkpoint_every == 0 or step == total
            if due or stop.requested or bad_in_a_row >= config.optimizer.max_nonfinite_steps:
                bad_in_a_row, previous = read(*previous), None
                with speed.paused():
                    checkpoints.save(step, state)
            if bad_in_a_row >= config.optimizer.max_nonfinite_steps:
                checkpoints.close()
                print(
                    f"stopped: {bad_in_a_row} steps in a row had a non-finite loss or gradient; their updates were "
                    f"skipped, and step {step} is saved. Try a lower optimizer.learning_rate",
                    file=sys.stderr,
                )
                return 1
            if stop.requested:
                checkpoints.close()
                print(f"stopped by a signal; step {step} is saved. The same command goes on from there", flush=True)
                return command.PREEMPTED
            if config.train.eval_every and step % config.train.eval_every == 0 and step != total:
                with speed.paused():
                    evaluate(step)

        checkpoints.close()
        trained = Trained(config, mesh, steps, state.params, tokenizer, vocab)
        if start == total:
            print(f"this run is finished: {total} steps are done")
        result_file = workdir / "result.json"
        result = json.loads(result_file.read_text()) if result_file.exists() else evaluate(total)
        if is_main:
            metrics.write_json(result_file, result)
            writers.close()
            print_summary(workdir, trained, result)
    return 0


class StopSignal:
    """Turns SIGTERM (a preemption) and SIGINT (Ctrl-C) into a request; a second one ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.requested = True
        print(f"{signal.Signals(number).name}: saving after this step, then leaving", file=sys.stderr, flush=True)
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)


def claim(workdir: Path, config: Config) -> None:
    """Writes `config.json` into a new workdir, or checks that the run in it is this one.

    Raises:
      UserError: the workdir belongs to a run with another config, or cannot be written.
    """
    from flax_mlm.metrics import write_json

    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_json(file, config.to_dict())
            return
        held = flatten(json.loads(file.read_text()))
    except (OSError, ValueError) as e:
        raise UserError(f"--workdir: '{workdir}' cannot be used: {e}") from e
    for name, value in flatten(config.to_dict()).items():
        if held.get(name) != value and not name.startswith(_FREE):
            raise UserError(
                f"--workdir: '{workdir}' holds a run with {name} = {held.get(name)}, and this one has {value}; "
                "use another --workdir"
            )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def print_banner(config: Config, corpus: Any, mesh: Any, steps: Any, memory: Any) -> None:
    """What is about to run, and on what."""
    import jax

    versions = "  ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint"))
    device = mesh.devices.flat[0]
    num_params = sum(x.size for x in jax.tree.leaves(steps.abstract.params))
    rows, tokens = corpus.counts["train"]["rows"], corpus.counts["train"]["tokens"]
    batch, total = config.train.global_batch_size, config.train.steps
    print(f"python {sys.version.split()[0]}  {versions}")
    print(f"devices     {mesh.size} × {device.device_kind} ({device.platform}), {jax.process_count()} process(es)")
    print(f"mesh        {dict(mesh.shape)}")
    print(f"model       {num_params:,} parameters, {steps.flops / batch / corpus.seq_len / 1e6:,.1f} MFLOPs per token")
    print(
        f"memory      {memory.argument_size_in_bytes / 2**20:,.0f} MiB of state and batch on each device, "
        f"{memory.temp_size_in_bytes / 2**20:,.0f} MiB of temporaries"
    )
    print(f"corpus      {corpus.path} ({corpus.source})")
    print(f"            {rows:,} rows of {corpus.seq_len}, {tokens:,} tokens, vocabulary {corpus.vocab_size:,}")
    print(
        f"run         {config.objective.name}, {total:,} steps of {batch} rows = {batch * total * tokens / rows:,.0f} "
        f"tokens ({batch * total / rows:.1f} epochs), {config.optimizer.name}",
        flush=True,
    )


def print_summary(workdir: Path, trained: Any, result: dict[str, float]) -> None:
    """How the run ended, and how to go on."""
    from flax_mlm import fill_mask
    from flax_mlm.tasks import mlm

    print("\n" + "\n".join(mlm.table(result, trained.config.objective.name)) + "\n")
    if trained.config.objective.name == "mlm":
        filler = fill_mask.Filler(trained)
        for sentence in fill_mask.EXAMPLES:
            with contextlib.suppress(UserError):  # longer than a row
                words = ", ".join(f"{word} {probability:.2f}" for word, probability in filler.top(sentence, 5)[0])
                print(f"{sentence}\n    {words}")
    if workdir.is_relative_to(Path.cwd()):
        workdir = workdir.relative_to(Path.cwd())
    print(f"\nwritten to {workdir}: checkpoints/  metrics.jsonl  config.json  result.json", end="")
    print("  tensorboard/" if trained.config.log.tensorboard else "")
    print("go on with")
    print(f"    python -m flax_mlm.evaluate --checkpoint={workdir} --task=mlm")
    print(f'    python -m flax_mlm.fill_mask --checkpoint={workdir} "The [MASK] of the United States."')


def main(config: Config) -> int:
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name a folder for the run, such as --workdir=runs/first")
    return train(config, Path(_WORKDIR.value).expanduser().absolute())


if __name__ == "__main__":
    command.run(main)
