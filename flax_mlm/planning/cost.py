"""Cost model of a compiled program: matmul FLOPs, memory traffic and collectives of one device in a step.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop iterates.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from flax_mlm.planning.hlo import Instruction, Program, array_bytes, dims, find, hbm_bytes, numbers, padded_bytes

# Operations that move nothing: names of existing arrays, or frames around instructions that are counted themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call", "optimization-barrier", "opt-barrier", "recv", "send", "async-start"),
}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_SCOPES = ("embeddings", "layers", "head", "loss", "optimizer", "fingerprint")


def executed(program: Program, computation: str = "", times: int = 1) -> Iterator[tuple[Instruction, str, int]]:
    """Yields (instruction, its computation, executions a step) of all that a device executes; a fusion is one."""
    computation = computation or program.entry
    for i in program.computations[computation].values():
        yield i, computation, times
        if i.operation == "while":
            yield from executed(program, i.called("body")[0], times * program.trip_count(i.called("condition")[0]))
        elif i.operation == "conditional":
            branches = i.called("branch_computations|(?:true|false)_computation")
            yield from executed(program, max(branches, key=lambda name: _branch_traffic(program, name)), times)
        elif i.operation in ("call", "async-start"):
            yield from executed(program, i.called("to_apply" if i.operation == "call" else "calls")[0], times)


def _branch_traffic(program: Program, computation: str) -> int:
    return sum(_traffic_of(program, i, computation) for i in program.computations[computation].values())


def count(program: Program, *operations: str) -> int:
    """Number of times that one device executes one of these operations in a step; a fusion counts as one."""
    return sum(times for i, _, times in executed(program) if i.operation in operations)


def matmul_flops(program: Program) -> float:
    """Additions and multiplications in one device's matmuls in a step, without those inside Pallas kernels."""
    return sum(times * _flops_of(program, i, computation) for i, computation, times in executed(program))


def traffic(program: Program) -> int:
    """Bytes that one device reads from and writes to its main memory (HBM) in a step, padding of tiles included.

    Arrays in on-chip memory do not count, nor do intermediate results inside a fusion.
    """
    return sum(times * _traffic_of(program, i, computation) for i, computation, times in executed(program))


def _flops_of(program: Program, i: Instruction, computation: str) -> float:
    if i.operation == "fusion":
        return sum(_flops_of(program, inner, i.called()[0]) for inner in program.fused(i))
    if i.operation not in ("dot", "convolution"):
        return 0.0
    left, right = (dims(program.computations[computation][name].shape) for name in i.operands)
    out = dims(i.shape)
    if i.operation == "dot":
        contracted = numbers(i.find(r"lhs_contracting_dims=\{([\d,]*)\}"))
        return 2.0 * math.prod(out) * math.prod(left[d] for d in contracted)
    # The TPU compiler writes matmuls as convolutions; batch dimensions of both sides are among the spatial ones.
    labels = re.split("_|->", i.find(r"dim_labels=([^\s,]+)"))
    sides = list(zip((left, right, out), labels, strict=True))
    window, products = i.find(r"window=\{([^}]*)\}"), 1
    for dim, letter in enumerate(sorted(filter(str.isdigit, labels[0]))):
        products *= _spatial_products([sizes[label.index(letter)] for sizes, label in sides], dim, window)
    groups = [int(i.find(rf"{kind}_group_count=(\d+)") or 1) for kind in ("feature", "batch")]
    inner = left[labels[0].index("f")] * left[labels[0].index("b")] // math.prod(groups)
    return 2.0 * inner * right[labels[1].index("o")] * products


def _spatial_products(sizes: list[int], dim: int, window: str) -> int:
    """Number of products of an input and a kernel element along a convolution's spatial dimension.

    Args:
      sizes: of input, kernel and output along the dimension.
    """
    size, kernel, out = sizes

    def option(name: str, default: str) -> str:
        return find(rf"\b{name}=(\S+)", window).split("x")[dim] if f"{name}=" in window else default

    stride, lhs_dilation, rhs_dilation = (int(option(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    padding = int(option("pad", "0_0").split("_")[0])
    positions = [o * stride + k * rhs_dilation - padding for o in range(out) for k in range(kernel)]
    return sum(0 <= p <= (size - 1) * lhs_dilation and p % lhs_dilation == 0 for p in positions)


def _traffic_of(program: Program, i: Instruction, computation: str) -> int:
    """Bytes that one execution of an instruction reads and writes."""
    if i.operation in _FREE or i.operation.endswith("-done") or '"AllocateBuffer"' in i.attributes:
        return 0
    defined, written = program.computations[computation], hbm_bytes(i.shape)
    operands = [hbm_bytes(defined[name].shape) if name in defined else 0 for name in i.operands]
    if i.operation == "dynamic-slice":
        return 2 * min(written, operands[0])
    if i.operation == "dynamic-update-slice":
        return 2 * min(operands[1], written)
    if i.operation == "gather":
        return 2 * written
    if i.operation != "fusion":
        return written + (0 if i.operation.endswith("-start") else sum(operands))
    for index, slice_bytes in _sliced_parameters(program, i.called()[0]).items():
        operands[index] = min(operands[index], slice_bytes) if index < len(operands) else 0
    for array, update in _updated_slices(program, i.called()[0]):
        written -= max(0, min(array, written) - update)
    return written + sum(operands)


@functools.cache
def _sliced_parameters(program: Program, fused: str) -> dict[int, int]:
    """Parameters of a fusion of which only slices are read: index -> bytes of these slices.

    An array that a slice is written into is not read.
    """
    sliced: dict[int, int] = {}
    instructions = program.computations[fused].values()
    for parameter in (i for i in instructions if i.operation == "parameter"):
        names, total, is_whole = {parameter.name}, 0, False
        for i in (i for i in instructions if names & set(i.operands)):
            if i.operation == "bitcast" or _only_changes_tiles(program, i):
                names.add(i.name)
            elif i.operation == "fusion":  # nested
                inner = _sliced_parameters(program, i.called()[0])
                read = [inner.get(index) for index, name in enumerate(i.operands) if name in names]
                is_whole |= None in read
                total += sum(part or 0 for part in read)
            elif i.operation in ("dynamic-slice", "gather") and i.operands[0] in names:
                total += padded_bytes(i.shape)
            elif not (i.operation == "dynamic-update-slice" and i.operands[0] in names):
                is_whole = True
        if not is_whole:
            sliced[int(parameter.operands[0])] = total
    return sliced


def _only_changes_tiles(program: Program, i: Instruction) -> bool:
    """Recognises an alias of its operand with other tiles, as compiled for tpu7x and later."""
    if i.operation != "fusion" or "output_to_operand_aliasing" not in i.attributes:
        return False
    return [inner.operation for inner in program.fused(i)] == ["parameter", "copy"]


@functools.cache
def _updated_slices(program: Program, fused: str) -> list[tuple[int, int]]:
    """Bytes of each result array of a fusion of which only a slice is written, and of that slice."""
    *_, root = program.computations[fused].values()
    updates = []
    for name in root.operands if root.operation == "tuple" else [root.name]:
        defined = program.computations[fused]
        i = defined[name]
        while i.operation in ("bitcast", "fusion"):
            if i.operation == "bitcast":
                i = defined[i.operands[0]]
            else:  # nested
                defined = program.computations[i.called()[0]]
                *_, i = defined.values()
        if i.operation == "dynamic-update-slice":
            updates.append((padded_bytes(i.shape), padded_bytes(defined[i.operands[1]].shape)))
    return updates


class Collective(NamedTuple):
    """Collectives of one kind, size, group and named scope."""

    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute
    axes: tuple[str, ...]  # mesh axes that it crosses; ("slices",) between TPU slices
    size: int  # number of devices, or slices, in a group
    bytes: int  # of the gathered or summed array, per device
    times: int  # a step
    scope: str  # named scope, such as layers or optimizer
    group: tuple[int, ...]  # one group's devices as indices into the mesh; empty between slices

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step with ring algorithms."""
        fraction = (self.size - 1) / self.size
        per_byte = {"all-reduce": 2 * fraction, "collective-permute": 1.0}.get(self.kind, fraction)
        return self.times * self.bytes * per_byte


def collectives(program: Program, mesh_shape: dict[str, int], slices: int = 1) -> list[Collective]:
    """Lists the collectives of a step, equal ones added up.

    Args:
      mesh_shape: axis -> size, in the order of the devices' numbers; the first axis crosses the slices.
      slices: number of TPU slices; the text is of one of them.
    """
    sizes = list(mesh_shape.values())
    sizes[0] //= slices
    totals: Counter[Collective] = Counter()
    seen: set[tuple[str, ...]] = set()

    def add(kind: str, size: int, i: Instruction, times: int) -> None:
        group = _group(i.attributes, sizes)
        indices = zip(mesh_shape, np.unravel_index(group, sizes), strict=True)
        if axes := tuple(axis for axis, index in indices if np.ptp(index)):
            size *= len(group) if kind == "reduce-scatter" else 1
            totals[Collective(kind, axes, len(group), size, 0, _scope(i), tuple(group))] += times

    for i, computation, times in executed(program):
        kind = i.operation.removesuffix("-start")
        if kind in _COLLECTIVES:
            arrays = array_bytes(i.shape)
            # The result of a -start is its operand and its result.
            add(kind, sum(arrays) if kind == i.operation else arrays[:2][-1], i, times)
        elif i.operation == "send" and "_xla_megascale_transfer_type" in i.attributes:
            kind = i.find(r'_transfer_type="(\w+)"').lower().replace("_", "-")
            totals[Collective(kind, ("slices",), slices, array_bytes(i.shape)[0], 0, "", ())] += times
        elif i.operation == "fusion":
            # The TPU compiler writes a reduce-scatter as a fusion; an asynchronous collective is in several fusions.
            is_scatter = i.called()[0].startswith("all-reduce-scatter")
            for inner in (inner for inner in program.fused(i) if inner.operation in _COLLECTIVES):
                kind = "reduce-scatter" if is_scatter else inner.operation
                key = (computation, kind, inner.find(r"channel_id=(\d+)"), _scope(inner))
                if is_scatter or key not in seen:
                    seen.add(key)
                    add(kind, sum(array_bytes(i.shape if is_scatter else inner.shape)), inner, times)
    return [collective._replace(times=times) for collective, times in totals.items()]


def _scope(i: Instruction) -> str:
    """Innermost of our named scopes in an instruction's op_name, or ""."""
    scopes = [name for name in re.findall(r"[\w]+", i.find(r'op_name="([^"]*)"')) if name in _SCOPES]
    return scopes[-1] if scopes else ""


def _group(attributes: str, sizes: list[int]) -> list[int]:
    """Devices of the first group."""
    if pairs := find(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        return [int(d) for d in re.findall(r"\d+", pairs)][:2]
    text = find(r"replica_groups=(mesh\[.*?\}|\{\{.*?\}\}|\[\S*)", attributes)
    if text.startswith("{{"):
        return numbers(text[2 : text.index("}")])
    if match := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):  # [groups, size]<=[dims]T(order)
        return _iota(match[3], match[4])[: int(match[2])].tolist()
    names = re.findall(r"'(\w+)'=(\d+)", text)  # mesh['a'=4,'b'=4], device_ids=([4,4]T(1,0)) {'b'}
    if not names:
        return list(range(math.prod(sizes)))
    shape = [int(size) for _, size in names]
    devices: np.ndarray = np.arange(math.prod(shape))
    if match := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", text):
        devices = _iota(*match.groups())
    elif match := re.search(r"device_ids=\(?\[?([\d,]+)\]?\)?", text):
        devices = np.array(numbers(match[1]))
    crossed = re.findall(r"'(\w+)'", text[text.rindex("{") :])
    index = tuple(slice(None) if name in crossed else 0 for name, _ in names)
    return sorted(devices.reshape(shape)[index].reshape(-1).tolist())


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Numbers devices over a shape, its dimensions transposed to `order`."""
    devices = np.arange(math.prod(numbers(shape))).reshape(numbers(shape))
    return (devices.transpose(numbers(order)) if order else devices).reshape(-1)
