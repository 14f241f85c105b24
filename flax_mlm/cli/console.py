"""What a run says of itself on the console: at its beginning, and when it is done."""

import contextlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flax_mlm.config import phases
from flax_mlm.errors import UserError
from flax_mlm.storage import gcs


def banner(parts: list[phases.Phase], mixtures: list[Any], mesh: Any, steps: Any, memory: list[Any]) -> None:
    """What is about to run, and on what."""
    import jax

    versions = "  ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint"))
    device = mesh.devices.flat[0]
    num_params = sum(x.size for x in jax.tree.leaves(steps.abstract.params))
    first = parts[0].config
    flops = steps.flops / first.train.global_batch_size / mixtures[0].seq_len
    print(f"python {sys.version.split()[0]}  {versions}")
    print(f"devices     {mesh.size} × {device.device_kind} ({device.platform}), {jax.process_count()} process(es)")
    print(f"mesh        {dict(mesh.shape)}")
    print(f"model       {num_params:,} parameters, {flops / 1e6:,.1f} MFLOPs per token")
    if memory:
        most = max(memory, key=lambda m: m.temp_size_in_bytes)
        print(
            f"memory      {most.argument_size_in_bytes / 2**20:,.0f} MiB of state and batch on each device, "
            f"{most.temp_size_in_bytes / 2**20:,.0f} MiB of temporaries"
        )
    rows = [(p.num_steps or 0) * p.config.train.global_batch_size for p in parts]
    for corpus in {id(corpus): corpus for corpus in mixtures}.values():  # phases may share one
        _corpus(corpus, sum(n for c, n in zip(mixtures, rows, strict=True) if c is corpus))
    budget = f"{first.train.length:g} {first.train.unit.removeprefix('budget_').replace('_', ' ')}"
    length = budget if first.train.has_budget else f"{first.train.steps:,} steps"
    tokens = sum(n * c.tokens_per_row for n, c in zip(rows, mixtures, strict=True))
    average = first.optimizer.averages
    averaged = f" (evaluated: the {average} average of its weights)" if average != "none" else ""
    of_rows = f" of {first.train.global_batch_size} rows" + f" = {tokens:,.0f} tokens" * bool(tokens)
    print(f"run         {first.objective.name}, {length}{of_rows}, {first.optimizer.name}{averaged}")
    for part in filter(lambda part: part.changes, parts):
        at = f"step {part.first_step:,} ({part.begin:.0%})" if part.num_steps else f"{part.begin:.0%}"
        print(f"            from {at} on {part.changes}")
    sys.stdout.flush()


def _corpus(corpus: Any, rows: int) -> None:
    """One corpus or several, of which so many rows are going to be read; 0: that is not known."""
    for (name, part), times in zip(corpus.corpora.items(), corpus.stream().epochs(rows), strict=True):
        counts, share = part.counts["train"], corpus.fractions[name]
        read = f", {share:.1%} of the rows" * (share < 1) + f" ({times:.2f} epochs)" * bool(rows)
        print(f"corpus      {part.path} ({part.source})")
        print(
            f"            {counts['rows']:,} rows of {corpus.seq_len}, {counts['tokens']:,} tokens, vocabulary "
            f"{corpus.vocab_size:,}{read}"
        )


def summary(workdir: gcs.AnyPath, trained: Any, result: dict[str, float]) -> None:
    """How the run ended, and how to go on."""
    import jax

    from flax_mlm.evaluation import mlm, rtd
    from flax_mlm.inference import mask_filler as filler_lib

    objective = trained.config.objective.name
    lines = rtd.table(result) if objective == "rtd" else mlm.table(result, objective)
    print("\n" + "\n".join(lines) + "\n")
    if objective == "mlm" and jax.process_count() == 1:  # one process alone could not ask the model
        filler = filler_lib.MaskFiller(trained)
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
