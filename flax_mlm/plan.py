"""Command: does a run fit on these chips, how fast could it be, and what would it cost? No TPU needed.

    python -m flax_mlm.plan --config=configs/bert_base.py --topology=v5e:4x4
    python -m flax_mlm.plan --config=configs/bert_base.py --topology=v5e:4x4 --slices=2 --token_budget=1e11 --price=1.2
    python -m flax_mlm.plan --config=configs/modernbert_base.py --topology=v5e:4x4 --sweep

The train step that `train` would run is compiled by the TPU's own compiler (`pip install -r
launch/tpu-requirements.txt`). Where it does not fit, the smallest change that fits is looked for. Leaves with 1 if the
config as it is does not fit.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from flax_mlm.cli import app as command
from flax_mlm.config import phases
from flax_mlm.config.load import build, from_dict
from flax_mlm.config.schema import Config
from flax_mlm.distributed import chips
from flax_mlm.errors import UserError
from flax_mlm.planning import compile as rehearsal
from flax_mlm.planning import roofline
from flax_mlm.planning.compile import CompiledStep, Target
from flax_mlm.storage import files

_TOPOLOGY = flags.DEFINE_string(
    "topology", "cpu", "what to plan for: a TPU slice such as v5e:4x4 or v5p:4x4x4, cpu[:DEVICES], gpu:NAME[:DEVICES]"
)
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of that kind", lower_bound=1)
_TOKEN_BUDGET = flags.DEFINE_float(
    "token_budget", None, "tokens to train on; default: what the config says", lower_bound=1.0
)
_PRICE = flags.DEFINE_float("price", None, "of a chip for an hour, in any currency", lower_bound=0.0)
_SWEEP = flags.DEFINE_bool("sweep", False, "compare meshes, remat and microbatches, and name the best")
_MESHES = flags.DEFINE_string(
    "meshes", "", "for --sweep: DATAxFSDPxTENSOR, comma-separated; default: every fsdp that is a power of two"
)
_JSON = flags.DEFINE_string("json", "", "also write what was found to this file")

_REMATS = ("none", "dots", "full")
# Below this many times the chip's memory it is for the compiler to say: it recomputes and fuses some of what the
# forward pass, as it is written, keeps.
_HOPELESS = 1.5


def main(config: Config) -> int:
    target = rehearsal.parse(_TOPOLOGY.value, _SLICES.value)
    if _JSON.value:
        files.check_writable("--json", Path(_JSON.value).expanduser())
    config = heaviest_phase(config)
    config, vocab_size = adopt_corpus(config)
    if _SWEEP.value:
        return sweep(config, vocab_size, target)
    found = rehearsal.rehearse(config, vocab_size, target)
    chip = chip_of(found, target)
    for line in [*what_runs(config, found, target), *memory(found, chip)]:
        print(line)
    result = {"target": str(target), **dataclasses.asdict(found)}
    if found.error:
        print(f"\ndoes not fit. The compiler: {found.error}\n")
        if change := smallest_change(config, vocab_size, target, chip):
            print(f"the smallest change that fits: {' '.join(f'--config.{k}={v}' for k, v in change.items())}")
        else:
            print(
                "no change of train.gradient_accumulation_steps, train.logits_chunks, model.remat and mesh.fsdp, "
                "or of two of them, fits"
            )
        result["smallest_change"] = change
    else:
        for line in [*tiling(config, found, target), *movement(found), *cost(config, found, chip)]:
            print(line)
        if chip:
            result["roofline"] = roofline.estimate(found, config, chip)._asdict()
    save(result)
    return 1 if found.error else 0


def save(found: dict[str, Any]) -> None:
    """Writes `--json`, where it is asked for."""
    if _JSON.value:
        files.write_json(Path(_JSON.value).expanduser(), found)


def heaviest_phase(config: Config) -> Config:
    """Of a run with phases the one with the most tokens at a time, of several such the one that predicts the most of
    them; as a run of its own."""

    def weight(phase: phases.Phase) -> tuple[float, float]:
        t = phase.config.train
        share = 1.0 if phase.config.objective.name == "clm" else phase.largest_mask_rate
        return t.global_batch_size // t.gradient_accumulation_steps * adopt_corpus(phase.config)[0].data.seq_len, share

    found = phases.parse_phases(config)
    heaviest = max(found, key=weight)
    if len(found) > 1:
        print(f"of the {len(found)} phases the heaviest, from {heaviest.begin:.0%} of the run on, is planned")
    interpolated = ", ".join(f"{path}->{value}" for path, value in heaviest.final_values.items())
    moves = f"0%: {interpolated}" if interpolated else ""
    train = dataclasses.replace(heaviest.config.train, phases=moves)
    return dataclasses.replace(heaviest.config, train=train)


def adopt_corpus(config: Config) -> tuple[Config, int]:
    """The config with the row length of its corpora, and the size of the vocabulary: that of the corpora or tokenizer
    that the config names, else what it asks for."""
    if config.data.corpus:
        from flax_mlm.data.mixture import Mixture

        corpus = Mixture.open(config.data)
        return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=corpus.seq_len)), (
            corpus.vocab_size
        )
    if config.tokenizer.path:
        from flax_mlm.data.tokenizer.load import load_tokenizer

        return config, load_tokenizer(config.tokenizer.path, config.tokenizer.extra_tokens_file).vocab_size
    return config, config.tokenizer.vocab_size


def chip_of(found: CompiledStep, target: Target) -> chips.Chip | None:
    """What is known of the target's chips.

    Raises:
      UserError: of a GPU, nothing is.
    """
    chip = chips.of_kind(target.gpu or found.device_kind)
    if target.gpu and chip is None:
        known = ", ".join(c.name for c in chips.CHIPS if not c.link)
        raise UserError(f"--topology: gpu '{target.gpu}' is not known here; these are: {known}")
    return chip


def what_runs(config: Config, found: CompiledStep, target: Target) -> Iterator[str]:
    rows, length = config.train.global_batch_size, config.data.seq_len
    cores = f", {found.devices} devices" if found.devices != found.chips else ""
    yield f"target      {target}: {found.chips} chip(s){cores}, mesh {found.mesh}"
    yield f"model       {found.parameters:,} parameters, {found.vocab_rows:,} rows of vocabulary"
    yield (
        f"step        {rows:,} rows of {length:,} = {rows * length:,} tokens; {found.flops / rows / length / 1e6:,.1f} "
        f"MFLOPs per token, {found.flops / 1e12:,.1f} TFLOPs per step"
    )
    kernel = f"{found.attention} (cuDNN's where it can, which keeps less)" if found.cudnn else found.attention
    yield (
        f"            attention {kernel}, remat {config.model.remat}, {config.train.gradient_accumulation_steps} "
        f"microbatch(es), {config.train.logits_chunks} loss chunk(s), {config.model.dtype}"
    )


def memory(found: CompiledStep, chip: chips.Chip | None) -> Iterator[str]:
    """Bytes of each device against what it has."""
    yield f"parameters  {gib(found.parameter_bytes)} of each device"
    yield f"optimizer   {gib(found.optimizer_bytes)}"
    yield f"activations {gib(found.activation_bytes)} that the forward pass keeps, as it is written"
    if found.compiled:
        yield f"temporaries {gib(found.temporary_bytes)}, as compiled: activations, gradients, work space"
        limit = ""
        if chip:
            has = chip.memory * found.chips / found.devices
            limit = f" of {gib(has)}, {found.total_bytes / has:.0%}"
        yield f"all         {gib(found.total_bytes)}{limit}   (compiled in {found.compile_seconds:.0f} s)"
    elif chip and not found.error:
        yield f"all         at least about {gib(found.least_bytes)} of {gib(chip.memory)}; not compiled"


def tiling(config: Config, found: CompiledStep, target: Target) -> Iterator[str]:
    """What fills the chip's units badly. A TPU's matmuls work on tiles of 128 × 128 (256 × 256 from v6e on), and
    bfloat16 lies in memory in tiles of 16 × 128."""
    if not target.is_tpu:
        return
    model, mesh = config.model, found.mesh
    rows = config.train.global_batch_size // (mesh["data"] * mesh["fsdp"] * config.train.gradient_accumulation_steps)
    side = 256 if target.kind in ("v6e", "tpu7x") else 128
    head = model.hidden_size // model.num_heads
    of_generator = [("the generator's width", config.generator.hidden_size, "")] * (config.objective.name == "rtd")
    notes = [
        f"{name} is {size}{part}, not a multiple of 128"
        for name, size, part in (
            ("model.hidden_size", model.hidden_size, ""),
            *of_generator,
            ("model.intermediate_size", model.intermediate_size // mesh["tensor"], " on each device"),
            ("the vocabulary", found.vocab_rows // mesh["tensor"], " rows on each device (model.vocab_multiple_of)"),
            ("data.seq_len", config.data.seq_len, ""),
        )
        if size % 128
    ]
    if head < side:
        notes.append(f"attention's heads are {head} wide, of the {side} that a matmul takes at once")
    if rows * config.data.seq_len % 16:
        notes.append(f"{rows} rows of {config.data.seq_len} on each device are not a multiple of 16 tokens")
    if rows * config.data.seq_len < 4096:
        notes.append(f"{rows * config.data.seq_len:,} tokens on each device at a time are few: matmuls wait for memory")
    yield f"tiles       {rows} rows, {model.num_heads // mesh['tensor']} heads on each device at a time" + (
        "" if notes else "; all fill them"
    )
    for note in notes:
        yield f"            {note}"


def movement(found: CompiledStep) -> Iterator[str]:
    """The collectives of a step, those of a kind, place and axis together."""
    if not found.compiled:
        return
    sums: dict[tuple[Any, ...], list[float]] = {}
    for one in found.collectives:
        key = (one["kind"], " × ".join(one["axes"]), one["size"], one["scope"] or "-")
        total = sums.setdefault(key, [0, 0.0, 0.0])
        for i, value in enumerate((one["times"], one["times"] * one["bytes"], one["sent"])):
            total[i] += value
    beside = ", besides those of the attention kernel" if found.attention != "xla" else ""
    yield f"matmuls     {found.matmul_ratio:.2f} × the FLOPs of the model, as compiled{beside}"
    yield f"operations  {found.fusions:,} fusions and {found.copies:,} copies by each device in a step"
    yield f"traffic     {found.traffic / 1e9:,.1f} GB of memory read and written by each device in a step"
    if not sums:
        return
    yield ""
    yield f"{'collective':20}{'across':14}{'of':>5}  {'in':12}{'times':>6}{'MB in all':>12}{'MB sent':>11}"
    small = 0.0
    for (kind, axes, size, scope), (times, moved, sent) in sorted(sums.items(), key=lambda item: -item[1][2]):
        if sent < 5e4:
            small += sent
            continue
        yield f"{kind:20}{axes:14}{size:5}  {scope:12}{times:6.0f}{moved / 1e6:12,.1f}{sent / 1e6:11,.1f}"
    if small:
        yield f"{'others, small':69}{small / 1e6:11,.1f}"


def cost(config: Config, found: CompiledStep, chip: chips.Chip | None) -> Iterator[str]:
    """Time and money, from the best to the worst that the roofline allows."""
    if chip is None:
        return
    roof, tokens = roofline.estimate(found, config, chip), config.train.global_batch_size * config.data.seq_len
    yield ""
    if not found.compiled:
        yield f"roofline    {1e3 * roof.compute:,.1f} ms of matmuls at the peak of {chip.flops / 1e12:,.0f} TFLOP/s"
        yield "            the rest of it is not known: nothing was compiled"
        bounds = [roof.best]
    else:
        yield (
            f"roofline    {1e3 * roof.compute:,.1f} ms of matmuls, {1e3 * roof.memory:,.1f} ms of memory, "
            f"{1e3 * roof.links:,.1f} ms of links, {1e3 * roof.network:,.1f} ms between slices"
        )
        bounds = [roof.best, roof.worst]
        wrap = f", rings where a dimension is a multiple of {chip.wraps}" if chip.wraps else ""
        yield (
            f"            at {chip.flops / 1e12:,.0f} TFLOP/s, {chip.bandwidth / 1e12:.2f} TB/s, {chip.link / 1e9:.0f} "
            f"GB/s a link and way{wrap}, {chip.network / 1e9:.1f} GB/s a chip between slices"
        )
        yield "            from all at once to one after another; see flax_mlm/planning/roofline.py. Not a measurement"
    t = config.train
    budget = _TOKEN_BUDGET.value or t.tokens or tokens * t.steps

    def span(values: list[float], form: str, unit: str, is_sure: bool = False) -> str:
        text = " to ".join(format(v, form) for v in values) + unit
        return text if len(values) > 1 or is_sure else f"{text} at best"

    use = [roofline.mfu(found, chip, s) for s in reversed(bounds)]
    yield f"a step      {span([1e3 * s for s in bounds], ',.1f', ' ms')}, MFU {span(use, '.0%', '')}"
    yield f"a day       {span([86.4e-6 / s * tokens for s in reversed(bounds)], ',.2f', ' billion tokens')}"
    by_clock = t.has_budget and not _TOKEN_BUDGET.value
    if by_clock:
        hours = [t.budget_minutes / 60]
        seen = span([3.6e-6 * hours[0] / s * tokens for s in reversed(bounds)], ",.2f", " billion tokens")
        yield f"the run     {seen} in the {hours[0]:,.2f} hours of train.{t.unit}"
    else:
        hours = [budget / tokens * s / 3600 for s in bounds]
        yield f"the run     {budget / 1e9:,.2f} billion tokens: {span([h / 24 for h in hours], ',.2f', ' days')}"
    if _PRICE.value is not None:
        costs = span([h * found.chips * _PRICE.value for h in hours], ",.2f", "", by_clock)
        yield f"            {costs}, at {_PRICE.value:g} per chip-hour"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def changed(config: Config, change: dict[str, Any]) -> Config | None:
    """The config with these fields, or None if it could not be."""
    values = from_dict(config.to_dict())
    values.update_from_flattened_dict(change)
    try:
        return build(values)
    except UserError:
        return None


def attempt(config: Config | None, vocab_size: int, target: Target, chip: chips.Chip | None) -> CompiledStep | None:
    """What was found of a config; None if it cannot be, or cannot fit."""
    if config is None:
        return None
    try:
        traced = rehearsal.rehearse(config, vocab_size, target, compiles=False)
    except UserError:  # rows that cannot be divided
        return None
    if chip and traced.least_bytes > _HOPELESS * chip.memory * traced.chips / traced.devices:
        return None
    found = rehearsal.rehearse(config, vocab_size, target)
    return None if found.error else found


def smallest_change(config: Config, vocab_size: int, target: Target, chip: chips.Chip | None) -> dict[str, Any] | None:
    """The first that fits: of one field, cheapest first, and then of two."""
    micro, fsdp = config.train.gradient_accumulation_steps, config.mesh.fsdp
    stronger = _REMATS[_REMATS.index(config.model.remat) + 1 :]
    one: list[dict[str, Any]] = [{"train.gradient_accumulation_steps": micro * n} for n in (2, 4, 8)]
    if config.objective.name != "rtd":
        one += [{"train.logits_chunks": config.train.logits_chunks * 8}]
    one += [{"model.remat": remat} for remat in stronger if remat == "dots"]
    one += [{"mesh.data": -1, "mesh.fsdp": fsdp * n} for n in (2, 4, 8, 16, 32)]
    one += [{"model.remat": remat} for remat in stronger if remat == "full"]
    two = [a | b for i, a in enumerate(one) for b in one[:i] if not a.keys() & b.keys()]
    for change in one + two:
        words = ", ".join(f"{name}={value}" for name, value in change.items() if value != -1)
        if (found := attempt(changed(config, change), vocab_size, target, chip)) is not None:
            print(f"  {words}: fits, {gib(found.total_bytes)}", flush=True)
            return {name: value for name, value in change.items() if value != -1 or config.mesh.data != -1}
        print(f"  {words}: does not", flush=True)
    return None


def sweep(config: Config, vocab_size: int, target: Target) -> int:
    """Compares meshes × remat × microbatches."""
    first = rehearsal.rehearse(config, vocab_size, target, compiles=False)
    chip = chip_of(first, target)
    if not target.is_tpu or chip is None:
        raise UserError(f"--sweep with --topology={_TOPOLOGY.value}: it compares estimates, which are of TPUs only")
    for line in what_runs(config, first, target):
        print(line)
    print(f"\n{'data×fsdp×tensor':18}{'remat':7}{'microbatches':>13}{'GiB':>8}{'ms, best to worst':>20}{'MFU':>12}")
    results: list[tuple[float, dict[str, Any], str]] = []

    def one_mesh(mesh: tuple[int, int, int]) -> None:
        fits: list[tuple[int, int]] = []
        for strength, remat in enumerate(_REMATS):
            for micro in (1, 2, 4, 8):
                if any(s <= strength and m <= micro for s, m in fits):
                    continue  # more work for nothing
                change: dict[str, Any] = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
                change |= {"model.remat": remat, "train.gradient_accumulation_steps": micro}
                tried = changed(config, change)
                found = attempt(tried, vocab_size, target, chip)
                start = f"{'×'.join(map(str, mesh)):18}{remat:7}{micro:13}"
                if tried is None or found is None:
                    print(f"{start}  does not fit" if tried else f"{start}  cannot be", flush=True)
                    continue
                fits.append((strength, micro))
                roof = roofline.estimate(found, tried, chip)
                times = f"{1e3 * roof.best:.1f} to {1e3 * roof.worst:.1f}"
                use = f"{roofline.mfu(found, chip, roof.worst):.0%} to {roofline.mfu(found, chip, roof.best):.0%}"
                line = f"{start}{found.total_bytes / 2**30:8.2f}{times:>20}{use:>12}"
                results.append((roof.worst, change, line))
                print(line, flush=True)

    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        for done in [
            pool.submit(one_mesh, mesh) for mesh in meshes(_MESHES.value, config, first.devices, target.slices)
        ]:
            done.result()
    if not results:
        print("\nnothing fits")
        return 1
    _, best, line = min(results, key=lambda result: result[0])
    print(f"\nthe best, by the time with nothing at once:\n{line}")
    print(" ".join(f"--config.{name}={value}" for name, value in best.items()))
    save({"best": best, "seconds": {str(c): s for s, c, _ in results}})
    return 0


def meshes(asked: str, config: Config, devices: int, slices: int) -> list[tuple[int, int, int]]:
    """Those asked for, or all with an fsdp that is a power of two and stays inside a slice.

    Raises:
      UserError: `--meshes` is not a list of meshes of so many devices.
    """
    if not asked:
        tensor = config.mesh.tensor
        inside = devices // slices // tensor
        sizes = [2**i for i in range(inside.bit_length()) if inside % 2**i == 0]
        return [(devices // tensor // fsdp, fsdp, tensor) for fsdp in sizes if config.model.hidden_size % fsdp == 0]
    try:
        found = []
        for text in asked.split(","):
            data, fsdp, tensor = (int(part) for part in text.split("x"))
            if data * fsdp * tensor != devices or min(data, fsdp, tensor) < 1:
                raise ValueError(text)
            found.append((data, fsdp, tensor))
    except ValueError:
        raise UserError(
            f"--meshes is '{asked}'; it takes DATAxFSDPxTENSOR with a product of {devices}, comma-separated"
        ) from None
    return found


if __name__ == "__main__":
    command.run(main)
