"""Searches over configs: the smallest change that fits a target, and the fastest of many meshes."""

import concurrent.futures
import functools
import os
from typing import Any, NamedTuple

from flax_mlm.config.load import build, from_dict
from flax_mlm.config.schema import Config
from flax_mlm.distributed import chips
from flax_mlm.errors import UserError
from flax_mlm.planning import report, roofline
from flax_mlm.planning.compile import CompiledStep, Target, compile_step_for

_REMATS = ("none", "dots", "full")
# The compiler recomputes and fuses some of what the forward pass keeps, so that up to this many times the chip's memory
# is left to it to decide.
_MEMORY_FACTOR = 1.5

Change = dict[str, Any]  # field -> value
Found = tuple[Config | None, CompiledStep | None]
Mesh = tuple[int, int, int]  # data, fsdp, tensor
_log = functools.partial(print, flush=True)


class Candidate(NamedTuple):
    """A config of a sweep that fits."""

    change: Change
    roof: roofline.Roofline
    line: str  # of the table


def compile_changed(config: Config, change: Change, vocab_size: int, target: Target, chip: chips.Chip | None) -> Found:
    """Applies a change, and compiles the step.

    Returns:
      the config, None where it is invalid; and the step, None where it does not fit.
    """
    values = from_dict(config.to_dict())
    values.update_from_flattened_dict(change)
    other = None
    try:
        other = build(values)
        traced = compile_step_for(other, vocab_size, target, compiles=False)
    except UserError:  # from the second: rows that the mesh cannot divide
        return other, None
    if chip and traced.least_bytes > _MEMORY_FACTOR * chip.memory * traced.chips / traced.devices:
        return other, None
    step = compile_step_for(other, vocab_size, target)
    return other, None if step.error else step


def smallest_change(config: Config, vocab_size: int, target: Target, chip: chips.Chip | None) -> Change | None:
    """Finds the first change that fits: of one field, cheapest first, and then of two. Prints a line for each."""
    accumulation, fsdp = config.train.gradient_accumulation_steps, config.mesh.fsdp
    stronger = _REMATS[_REMATS.index(config.model.remat) + 1 :]
    singles: list[Change] = [{"train.gradient_accumulation_steps": accumulation * n} for n in (2, 4, 8)]
    if config.objective.name != "rtd":
        singles.append({"train.logits_chunks": config.train.logits_chunks * 8})
    singles += [{"model.remat": remat} for remat in stronger if remat == "dots"]
    singles += [{"mesh.data": -1, "mesh.fsdp": fsdp * n} for n in (2, 4, 8, 16, 32)]
    singles += [{"model.remat": remat} for remat in stronger if remat == "full"]
    pairs = [a | b for i, a in enumerate(singles) for b in singles[:i] if not a.keys() & b.keys()]
    for change in singles + pairs:
        description = ", ".join(f"{name}={value}" for name, value in change.items() if value != -1)
        _, step = compile_changed(config, change, vocab_size, target, chip)
        if step is not None:
            _log(f"  {description}: fits, {report.gib(step.total_bytes)}")
            return {name: value for name, value in change.items() if value != -1 or config.mesh.data != -1}
        _log(f"  {description}: does not fit")
    return None


def sweep(config: Config, vocab_size: int, target: Target, chip: chips.Chip, meshes: list[Mesh]) -> list[Candidate]:
    """Compiles meshes × remat × microbatches, without those that do more work than one that fits. Prints a table."""
    _log(f"\n{'data×fsdp×tensor':18}{'remat':7}{'microbatches':>13}{'GiB':>8}{'ms, best to worst':>20}{'MFU':>12}")
    candidates: list[Candidate] = []

    def sweep_mesh(mesh: Mesh) -> None:
        fits: list[tuple[int, int]] = []
        for strength, remat in enumerate(_REMATS):
            for microbatches in (1, 2, 4, 8):
                if any(s <= strength and m <= microbatches for s, m in fits):
                    continue
                change: Change = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
                change |= {"model.remat": remat, "train.gradient_accumulation_steps": microbatches}
                other, step = compile_changed(config, change, vocab_size, target, chip)
                line = f"{'×'.join(map(str, mesh)):18}{remat:7}{microbatches:13}"
                if other is None or step is None:
                    _log(f"{line}  does not fit" if other else f"{line}  invalid config")
                    continue
                fits.append((strength, microbatches))
                roof = roofline.estimate(step, other, chip)
                times = f"{1e3 * roof.best:.1f} to {1e3 * roof.worst:.1f}"
                mfu = f"{roofline.mfu(step, chip, roof.worst):.0%} to {roofline.mfu(step, chip, roof.best):.0%}"
                line += f"{step.total_bytes / 2**30:8.2f}{times:>20}{mfu:>12}"
                candidates.append(Candidate(change, roof, line))
                _log(line)

    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        list(pool.map(sweep_mesh, meshes))
    return candidates


def parse_meshes(text: str, config: Config, devices: int, slices: int) -> list[Mesh]:
    """Parses `--meshes`; empty: every fsdp that is a power of two and stays inside a slice.

    Raises:
      UserError: the text is not a list of meshes of so many devices.
    """
    if not text:
        tensor = config.mesh.tensor
        per_slice = devices // slices // tensor
        sizes = [2**i for i in range(per_slice.bit_length()) if per_slice % 2**i == 0]
        return [(devices // tensor // fsdp, fsdp, tensor) for fsdp in sizes if config.model.hidden_size % fsdp == 0]
    meshes = []
    try:
        for item in text.split(","):
            data, fsdp, tensor = (int(size) for size in item.split("x"))
            if data * fsdp * tensor != devices or min(data, fsdp, tensor) < 1:
                raise ValueError(item)
            meshes.append((data, fsdp, tensor))
    except ValueError:
        expected = f"DATAxFSDPxTENSOR with a product of {devices}, comma-separated"
        raise UserError(f"--meshes is '{text}'; expected {expected}") from None
    return meshes
