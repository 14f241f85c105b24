"""The lines that a run prints at its start and its end."""

import contextlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flax_mlm.config.phases import Phase
from flax_mlm.errors import UserError
from flax_mlm.storage import gcs

_EXAMPLES = (
    "The President of the United [MASK] spoke to Congress.",
    "We must [MASK] the peace of the world.",
    "The [MASK] of the people depends on good laws.",
)


def banner(run_phases: list[Phase], mixtures: list[Any], mesh: Any, training: Any, memory: list[Any]) -> None:
    """Prints the versions, devices, mesh, model, memory, corpora and phases of a run."""
    import jax

    versions = "  ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint"))
    device = mesh.devices.flat[0]
    num_params = sum(x.size for x in jax.tree.leaves(training.abstract.params))
    first = run_phases[0].config
    flops = training.flops / first.train.global_batch_size / mixtures[0].seq_len
    print(f"python {sys.version.split()[0]}  {versions}")
    print(f"devices     {mesh.size} × {device.device_kind} ({device.platform}), {jax.process_count()} process(es)")
    print(f"mesh        {dict(mesh.shape)}")
    print(f"model       {num_params:,} parameters, {flops / 1e6:,.1f} MFLOPs per token")
    if memory:
        most = max(memory, key=lambda m: m.temp_size_in_bytes)
        state, temporaries = most.argument_size_in_bytes / 2**20, most.temp_size_in_bytes / 2**20
        print(f"memory      {state:,.0f} MiB of state and batch on each device, {temporaries:,.0f} MiB of temporaries")
    rows = [(p.num_steps or 0) * p.config.train.global_batch_size for p in run_phases]
    for mixture in {id(mixture): mixture for mixture in mixtures}.values():  # phases may share one
        _print_corpora(mixture, sum(n for m, n in zip(mixtures, rows, strict=True) if m is mixture))
    length = f"{first.train.budget_minutes:g} minutes" if first.train.budget_minutes else f"{first.train.steps:,} steps"
    tokens = sum(n * m.tokens_per_row for n, m in zip(rows, mixtures, strict=True))
    average = first.optimizer.averages
    averaged = f" (evaluates the {average} average of the weights)" if average != "none" else ""
    of_rows = f" of {first.train.global_batch_size} rows" + f" = {tokens:,.0f} tokens" * bool(tokens)
    print(f"run         {first.objective.name}, {length}{of_rows}, {first.optimizer.name}{averaged}")
    for phase in filter(lambda phase: phase.changes, run_phases):
        at = f"step {phase.first_step:,} ({phase.begin:.0%})" if phase.num_steps else f"{phase.begin:.0%}"
        print(f"            from {at} on {phase.changes}")
    sys.stdout.flush()


def _print_corpora(mixture: Any, rows: int) -> None:
    """Prints the corpora of a mixture, with the epochs in this many rows; 0: unknown."""
    for (name, corpus), epochs in zip(mixture.corpora.items(), mixture.stream().epochs(rows), strict=True):
        counts, fraction = corpus.counts["train"], mixture.fractions[name]
        read = f", {fraction:.1%} of the rows" * (fraction < 1) + f" ({epochs:.2f} epochs)" * bool(rows)
        print(f"corpus      {corpus.path} ({corpus.about['name']})")
        size = f"{counts['rows']:,} rows of {mixture.seq_len}, {counts['tokens']:,} tokens"
        print(f"            {size}, vocabulary {mixture.vocab_size:,}{read}")


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
    if workdir.is_relative_to(Path.cwd()):
        workdir = workdir.relative_to(Path.cwd())
    print(f"\nwritten to {workdir}: checkpoints/  metrics.jsonl  config.json  result.json", end="")
    print("  tensorboard/" if trained.config.log.tensorboard else "")
    print("Next steps:")
    print(f"    python -m flax_mlm.evaluate --checkpoint={workdir} --task=mlm")
    if objective == "mlm":
        print(f'    python -m flax_mlm.fill_mask --checkpoint={workdir} "The [MASK] of the United States."')
    print(f"    python -m flax_mlm.export --checkpoint={workdir} --output=exported")
