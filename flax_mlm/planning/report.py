"""Report of a plan as lines of text: what runs, its memory, tiles and collectives, and what it costs."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flax_mlm.config.phases import Phase
from flax_mlm.config.schema import Config
from flax_mlm.data.mixture import Mixture
from flax_mlm.distributed.chips import Chip
from flax_mlm.planning import roofline
from flax_mlm.planning.compile import CompiledStep, Target

_FEW_TOKENS = 4096
_SMALL_TRANSFER = 5e4  # bytes; smaller collectives are reported together


def mixture_lines(run_phases: Sequence[Phase], mixtures: Sequence[Mixture]) -> Iterator[str]:
    """Describes what each phase with several corpora reads of them, with epochs where the run's length is in steps or
    tokens."""
    for phase, mixture in zip(run_phases, mixtures, strict=True):
        if len(mixture.corpora) == 1:
            continue
        d = phase.config.data
        weighted = "by their weights" if any(d.folders().values()) else f"by rows ** {d.sampling_alpha:g}"
        yield f"data        from {phase.begin:.0%} on {len(mixture.corpora)} corpora, {weighted}"
        epochs = mixture.stream().epochs((phase.num_steps or 0) * phase.config.train.global_batch_size)
        width = max(map(len, mixture.corpora))
        for (name, corpus), read in zip(mixture.corpora.items(), epochs, strict=True):
            rows = f"{corpus.counts['train']['rows']:>11,} rows of {mixture.seq_len}"
            times = f" ({read:.2f} epochs)" if phase.num_steps else ""
            yield f"            {name:{width}}  {rows}, {mixture.fractions[name]:6.1%} of the rows read{times}"


def model_lines(config: Config, step: CompiledStep, target: Target) -> Iterator[str]:
    """Describes target, model and step."""
    rows, length = config.train.global_batch_size, config.data.seq_len
    devices = f", {step.devices} devices" if step.devices != step.chips else ""
    yield f"target      {target}: {step.chips} chip(s){devices}, mesh {step.mesh}"
    yield f"model       {step.parameters:,} parameters, {step.vocab_rows:,} rows of vocabulary"
    flops = f"{step.flops / rows / length / 1e6:,.1f} MFLOPs per token, {step.flops / 1e12:,.1f} TFLOPs per step"
    yield f"step        {rows:,} rows of {length:,} = {rows * length:,} tokens; {flops}"
    kernel = f"{step.attention} (cuDNN's where available, which keeps less)" if step.cudnn else step.attention
    parts = f"{config.train.gradient_accumulation_steps} microbatch(es), {config.train.logits_chunks} logits chunk(s)"
    yield f"            attention {kernel}, remat {config.model.remat}, {parts}, {config.model.dtype}"


def memory_lines(step: CompiledStep, chip: Chip | None) -> Iterator[str]:
    """Compares bytes of each device with its memory."""
    yield f"parameters  {gib(step.parameter_bytes)} on each device"
    yield f"optimizer   {gib(step.optimizer_bytes)}"
    yield f"activations {gib(step.activation_bytes)} kept by the forward pass, before the compiler's optimisations"
    if step.compiled:
        yield f"temporaries {gib(step.temporary_bytes)} as compiled: activations, gradients, work space"
        limit = ""
        if chip:
            memory = chip.memory * step.chips / step.devices
            limit = f" of {gib(memory)}, {step.total_bytes / memory:.0%}"
        yield f"total       {gib(step.total_bytes)}{limit}   (compiled in {step.compile_seconds:.0f} s)"
    elif chip and not step.error:
        yield f"total       at least about {gib(step.least_bytes)} of {gib(chip.memory)}; not compiled"


def tiling_lines(config: Config, step: CompiledStep, target: Target) -> Iterator[str]:
    """Names sizes that leave a TPU's units partly idle.

    Matmuls work on tiles of 128 × 128 (256 × 256 from v6e on), and bfloat16 is stored in tiles of 16 × 128.
    """
    if not target.is_tpu:
        return
    model, mesh = config.model, step.mesh
    rows = config.train.global_batch_size // (mesh["data"] * mesh["fsdp"] * config.train.gradient_accumulation_steps)
    tokens, head = rows * config.data.seq_len, model.hidden_size // model.num_heads
    tile = 256 if target.kind in ("v6e", "tpu7x") else 128
    per_device = "on each device"
    sizes = [
        ("model.hidden_size", model.hidden_size, ""),
        ("model.intermediate_size", model.intermediate_size // mesh["tensor"], f" {per_device}"),
        ("the vocabulary", step.vocab_rows // mesh["tensor"], f" rows {per_device} (model.vocab_multiple_of)"),
        ("data.seq_len", config.data.seq_len, ""),
    ]
    if config.objective.name == "rtd":
        sizes.append(("generator.hidden_size", config.generator.hidden_size, ""))
    notes = [f"{name} is {size}{unit}, not a multiple of 128" for name, size, unit in sizes if size % 128]
    if head < tile:
        notes.append(f"attention heads are {head} wide; a matmul tile is {tile}")
    if tokens % 16:
        notes.append(f"{rows} rows of {config.data.seq_len} {per_device} are not a multiple of 16 tokens")
    if tokens < _FEW_TOKENS:
        notes.append(f"{tokens:,} tokens {per_device} at a time are few: matmuls wait for memory")
    heads = model.num_heads // mesh["tensor"]
    yield f"tiles       {rows} rows, {heads} heads {per_device} at a time" + ("" if notes else "; all tiles are full")
    yield from (f"            {note}" for note in notes)


def program_lines(step: CompiledStep) -> Iterator[str]:
    """Describes the compiled program, and its collectives by kind, axes, size and scope."""
    if not step.compiled:
        return
    without = ", without those of the attention kernel" if step.attention != "xla" else ""
    yield f"matmuls     {step.matmul_ratio:.2f} × the FLOPs of the model, as compiled{without}"
    yield f"operations  {step.fusions:,} fusions and {step.copies:,} copies by each device in a step"
    yield f"traffic     {step.traffic / 1e9:,.1f} GB of memory read and written by each device in a step"
    sums: dict[tuple[Any, ...], Any] = {}
    for c in step.collectives:
        key = c["kind"], " × ".join(c["axes"]), c["size"], c["scope"] or "-"
        sums[key] = sums.get(key, 0) + np.array([c["times"], c["times"] * c["bytes"], c["sent"]])
    if not sums:
        return
    yield ""
    yield f"{'collective':20}{'axes':14}{'size':>5}  {'scope':12}{'times':>6}{'MB in total':>12}{'MB sent':>11}"
    rows = sorted(sums.items(), key=lambda item: -item[1][2])
    for (kind, axes, size, scope), (times, moved, sent) in rows:
        if sent >= _SMALL_TRANSFER:
            yield f"{kind:20}{axes:14}{size:5}  {scope:12}{times:6.0f}{moved / 1e6:12,.1f}{sent / 1e6:11,.1f}"
    if small := sum(sent for _, (_, _, sent) in rows if sent < _SMALL_TRANSFER):
        yield f"{'others, small':69}{small / 1e6:11,.1f}"


def cost_lines(
    config: Config, step: CompiledStep, chip: Chip | None, token_budget: float | None, price: float | None
) -> Iterator[str]:
    """Estimates time and money, from full overlap to no overlap of the roofline's parts.

    Args:
      token_budget: tokens to train on; None: as the config says.
      price: price per chip-hour; None: unknown.
    """
    if chip is None:
        return
    roof, t = roofline.estimate(step, config, chip), config.train
    tokens = t.global_batch_size * config.data.seq_len
    bounds = [roof.best, roof.worst] if step.compiled else [roof.best]
    yield ""
    if step.compiled:
        rings = f", rings where a dimension is a multiple of {chip.wraps}" if chip.wraps else ""
        yield (
            f"roofline    {1e3 * roof.compute:,.1f} ms of matmuls, {1e3 * roof.memory:,.1f} ms of memory, "
            f"{1e3 * roof.links:,.1f} ms of links, {1e3 * roof.network:,.1f} ms between slices\n"
            f"            at {chip.flops / 1e12:,.0f} TFLOP/s, {chip.bandwidth / 1e12:.2f} TB/s, {chip.link / 1e9:.0f} "
            f"GB/s a link and direction{rings}, {chip.network / 1e9:.1f} GB/s a chip between slices\n"
            "            from full overlap to no overlap of these; see flax_mlm/planning/roofline.py. Not a measurement"
        )
    else:
        yield f"roofline    {1e3 * roof.compute:,.1f} ms of matmuls at the peak of {chip.flops / 1e12:,.0f} TFLOP/s"
        yield "            memory and network are unknown: nothing was compiled"

    def span(values: list[float], form: str, unit: str, is_exact: bool = False) -> str:
        text = " to ".join(format(v, form) for v in values) + unit
        return text if len(values) > 1 or is_exact else f"{text} at best"

    def billion_tokens(seconds: float) -> str:
        return span([1e-9 * seconds / s * tokens for s in reversed(bounds)], ",.2f", " billion tokens")

    mfu = [roofline.mfu(step, chip, s) for s in reversed(bounds)]
    yield f"a step      {span([1e3 * s for s in bounds], ',.1f', ' ms')}, MFU {span(mfu, '.0%', '')}"
    yield f"a day       {billion_tokens(86400)}"
    by_clock = t.budget_minutes > 0 and not token_budget
    if by_clock:
        hours = [t.budget_minutes / 60]
        yield f"the run     {billion_tokens(3600 * hours[0])} in the {hours[0]:,.2f} hours of train.{t.unit}"
    else:
        total = token_budget or t.tokens or tokens * t.steps
        hours = [total / tokens * s / 3600 for s in bounds]
        yield f"the run     {total / 1e9:,.2f} billion tokens: {span([h / 24 for h in hours], ',.2f', ' days')}"
    if price is not None:
        costs = span([h * step.chips * price for h in hours], ",.2f", "", by_clock)
        yield f"            {costs}, at {price:g} per chip-hour"


def gib(size: float) -> str:
    """Formats bytes as GiB."""
    return f"{size / 2**30:.2f} GiB"
