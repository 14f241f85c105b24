"""The lines that a run prints at its start and its end."""

import contextlib
import datetime
import math
import shlex
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flax_mlm.cli import tables
from flax_mlm.config.phases import Phase
from flax_mlm.config.schema import Config
from flax_mlm.distributed.processes import ProcessGroup
from flax_mlm.errors import UserError
from flax_mlm.inference.config import usual_learning_rate
from flax_mlm.storage import gcs
from flax_mlm.training.metrics import fit

_EXAMPLES = (
    "The President of the United [MASK] spoke to Congress.",
    "We must [MASK] the peace of the world.",
    "The [MASK] of the people depends on good laws.",
)


def log(line: str) -> None:
    """Prints a line at once: what it names may take minutes."""
    print(line, flush=True)


def recipe(run_phases: list[Phase], workdir: gcs.AnyPath) -> str:
    """Formats the versions and what the config of the first phase says: known before anything is opened or compiled."""
    first = run_phases[0]
    versions = "  ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint"))
    m, t, objective = first.config.model, first.config.train, first.config.objective
    seq_len, start = first.config.data.seq_len, first.config.init_from or "new weights"
    lines = [
        f"python {sys.version.split()[0]}  {versions}",
        f"workdir     {_relative(workdir)}",
        f"recipe      {objective.name}, {t.length:,.10g} {t.unit} of {t.global_batch_size} rows of {seq_len}",
        f"            {m.num_layers} layers of {m.hidden_size}, {m.num_heads} heads, {start}",
    ]
    if objective.name != "clm":
        lines.append(f"masking     {objective.masking}, mask rate {_spelt(first, 'objective.mask_rate')}")
    return "\n".join([*lines, f"optimizer   {_optimizer(first)}", *_warning_of_rate(run_phases)])


def _optimizer(phase: Phase) -> str:
    """Describes the optimizer, its peak learning rate and schedule, and the average of the weights."""
    o = phase.config.optimizer
    rate = f"{o.name}, peak learning rate {_spelt(phase, 'optimizer.learning_rate')}"
    warmup = f"{o.warmup_steps:,} steps" if o.warmup_steps else f"{o.warmup_fraction:.1%} of the run"
    schedule = f"{o.schedule} after a warm-up of {warmup}"
    if o.head_first_steps:
        schedule += f"; at first the vocabulary head alone, for {o.head_first_steps:,} steps"
    return f"{rate}, {schedule}" + f"; evaluates the {o.averages} average of the weights" * (o.averages != "none")


def _spelt(phase: Phase, path: str) -> str:
    """A value of a phase, `a->b` where it changes."""
    first, last = phase.value(path, 0.0), phase.value(path, 1.0)
    return f"{first:g}" if first == last else f"{first:g}->{last:g}"


def _warning_of_rate(run_phases: list[Phase]) -> Iterator[str]:
    """Warns of a learning rate with which a run that starts from a Hugging Face folder would erase what that knows."""
    config = run_phases[0].config
    usual = usual_learning_rate(config.model.hidden_size)
    peak = max(p.value("optimizer.learning_rate", x) for p in run_phases for x in (0.0, 1.0))
    if config.init_from and peak > 9.99 * usual:
        what = f"optimizer.learning_rate is {peak:g}; usual for a pretrained encoder of this width is {usual:g}"
        remedy = "a rate that is ten times higher erases what it knows; --config=continue_pretraining has a recipe"
        yield f"WARNING: {what}; {remedy}"


def devices(mesh: Any) -> str:
    """Formats the devices and the mesh."""
    import jax

    device = mesh.devices.flat[0]
    what = f"{mesh.size} × {device.device_kind} ({device.platform}), {jax.process_count()} process(es)"
    return f"devices     {what}\nmesh        {dict(mesh.shape)}"


def data(run_phases: list[Phase], mixtures: list[Any]) -> str:
    """Formats the corpora and the phases of a run."""
    rows = [(p.num_steps or 0) * p.config.train.global_batch_size for p in run_phases]
    lines: list[str] = []
    for i, mixture in enumerate(mixtures):
        if not any(m is mixture for m in mixtures[:i]):  # phases may share one
            alpha = run_phases[i].config.data.sampling_alpha
            lines += _corpora(mixture, sum(n for m, n in zip(mixtures, rows, strict=True) if m is mixture), alpha)
    t = run_phases[0].config.train
    length = f"{t.budget_minutes:g} minutes" if t.budget_minutes else f"{t.steps:,} steps"
    tokens = sum(n * m.tokens_per_row for n, m in zip(rows, mixtures, strict=True))
    lines.append(f"run         {length} of {t.global_batch_size} rows" + f" = {tokens:,.0f} tokens" * bool(tokens))
    for phase in filter(lambda phase: phase.changes, run_phases):
        at = f"step {phase.first_step:,} ({phase.begin:.0%})" if phase.num_steps else f"{phase.begin:.0%}"
        lines.append(f"            from {at} on {phase.changes}")
    return "\n".join(lines)


def _corpora(mixture: Any, rows: int, alpha: float) -> Iterator[str]:
    """Formats the corpora of a mixture, with the epochs in this many rows; 0: unknown."""
    if alpha != 1.0 and len(mixture.corpora) > 1:
        yield f"sampling    {len(mixture.corpora)} corpora in proportion to rows ** {alpha:g} (data.sampling_alpha)"
    for (name, corpus), epochs in zip(mixture.corpora.items(), mixture.stream().epochs(rows), strict=True):
        counts, fraction = corpus.counts["train"], mixture.fractions[name]
        read = f", {fraction:.1%} of the rows" * (fraction < 1) + f" ({epochs:.2f} epochs)" * bool(rows)
        yield f"corpus      {corpus.path} ({corpus.about['name']})"
        size = f"{counts['rows']:,} rows of {mixture.seq_len}, {counts['tokens']:,} tokens"
        yield f"            {size}, vocabulary {mixture.vocab_size:,}{read}"


def model(config: Config, seq_len: int, training: Any) -> str:
    """Formats the size of a model."""
    import jax

    num_params = sum(x.size for x in jax.tree.leaves(training.abstract.params))
    flops = training.flops / config.train.global_batch_size / seq_len
    return f"model       {num_params:,} parameters, {flops / 1e6:,.1f} MFLOPs per token"


def memory(statistics: list[Any]) -> str:
    """Formats the memory of the step that takes most, of those of all phases."""
    most = max(statistics, key=lambda m: m.temp_size_in_bytes)
    state, temporaries = most.argument_size_in_bytes / 2**20, most.temp_size_in_bytes / 2**20
    return f"memory      {state:,.0f} MiB of state and batch on each device, {temporaries:,.0f} MiB of temporaries"


class RunStatus:
    """The status line of a run.

    Attributes:
      run: the run, once it trains.
    """

    run: Any = None  # a loop.Run, whose import is heavy

    def __init__(self, group: ProcessGroup):
        self._group, self._doing, self._since = group, "", 0.0

    def line(self, columns: int) -> str:
        """Formats a bar with step, loss, tokens/s and ETA, and an activity other than training with its seconds."""
        if (doing := self._group.doing) != self._doing:
            self._doing, self._since = doing, time.monotonic()
        elapsed = datetime.timedelta(seconds=int(time.monotonic() - self._since))
        activity = [] if doing in ("training", "waiting for a batch") else [(0, f"{doing} {elapsed}")]
        if not self.run:
            return fit(activity, columns)
        last = self.run.logger.last
        parts = [
            (0, f"{math.floor(100 * self.run.progress):3}%"),
            (0, f"step {self.run.logger.position(self.run.step, self.run.progress)}"),
        ]
        if last:
            parts.append((2, f"loss {last['loss']:.4f}"))
        if "tokens_per_second" in last:  # the first step of a start has no rates
            eta = datetime.timedelta(seconds=round(last["eta_seconds"]))
            parts += [(3, f"tokens/s {last['tokens_per_second']:,.0f}"), (1, f"eta {eta}")]
        text = fit(parts + activity, columns)
        if (room := min(columns - len(text) - 4, 30)) < 5:
            return text
        filled = math.floor(room * self.run.progress)
        return f"[{'=' * filled}{' ' * (room - filled)}] {text}"


def summary(workdir: gcs.AnyPath, trained: Any, result: dict[str, float]) -> None:
    """Prints the last evaluation, filled masks, the files written and the next commands."""
    import jax

    from flax_mlm.evaluation import mlm
    from flax_mlm.inference.mask_filler import MaskFiller

    objective = trained.config.objective.name
    print("\n" + "\n".join(mlm.table({**result, "objective": objective})) + "\n")
    if objective == "mlm" and jax.process_count() == 1:  # needs all processes otherwise
        filler = MaskFiller(trained)
        for sentence in _EXAMPLES:
            with contextlib.suppress(UserError):  # longer than a row
                words = ", ".join(f"{word} {probability:.2f}" for word, probability in filler.top_words(sentence, 5)[0])
                print(f"{sentence}\n    {words}")
    if note := tables.cut_note(result):
        print(f"\nNOTE: {note}")
    workdir = _relative(workdir)
    print(f"\nwritten to {workdir}: checkpoints/  metrics.jsonl  config.json  result.json", end="")
    print("  tensorboard/" if trained.config.log.tensorboard else "")
    print("Next steps:")
    checkpoint = shlex.quote(f"--checkpoint={workdir}")
    print(f"    python -m flax_mlm.evaluate {checkpoint} --task=mlm")
    if objective == "mlm":
        print(f'    python -m flax_mlm.fill_mask {checkpoint} "The [MASK] of the United States."')
    print(f"    python -m flax_mlm.export {checkpoint} --output=exported")


def _relative(workdir: gcs.AnyPath) -> gcs.AnyPath:
    return workdir.relative_to(Path.cwd()) if workdir.is_relative_to(Path.cwd()) else workdir
