"""Cost model of a compiled program: matmul FLOPs and memory traffic of one device in a step.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop iterates.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator

from flax_mlm.planning.hlo import Instruction, Program, dims, find, hbm_bytes, padded_bytes

# Operations that move nothing: names of existing arrays, or frames around instructions that are counted themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call", "optimization-barrier", "opt-barrier", "recv", "send", "async-start"),
}


def executed(program: Program, computation: str = "", times: int = 1) -> Iterator[tuple[Instruction, str, int]]:
    """Yields (instruction, its computation, executions a step) of all that a device executes; a fusion is one."""
    computation = computation or program.entry
    for i in program.computations[computation]:
        yield i, computation, times
        if i.operation == "while":
            trips = program.trip_count(i.called("condition")[0])
            yield from executed(program, i.called("body")[0], times * trips)
        elif i.operation == "conditional":
            branches = i.called("branch_computations|(?:true|false)_computation")
            yield from executed(program, max(branches, key=lambda name: _branch_traffic(program, name)), times)
        elif i.operation in ("call", "async-start"):
            yield from executed(program, i.called("to_apply" if i.operation == "call" else "calls")[0], times)


def _branch_traffic(program: Program, computation: str) -> int:
    return sum(traffic_of(program, i, computation) for i in program.computations[computation])


def _total(program: Program, cost: Callable[[Program, Instruction, str], float]) -> float:
    return sum(times * cost(program, i, computation) for i, computation, times in executed(program))


def count(program: Program, *operations: str) -> int:
    """Number of times that one device executes one of these operations in a step; a fusion counts as one."""
    return int(_total(program, lambda _, i, computation: i.operation in operations))


def matmul_flops(program: Program) -> float:
    """Additions and multiplications in one device's matmuls in a step, without those inside Pallas kernels."""
    return _total(program, _flops_of)


def traffic(program: Program) -> int:
    """Bytes that one device reads from and writes to its main memory (HBM) in a step, padding of tiles included.

    Arrays in on-chip memory do not count, nor do intermediate results inside a fusion.
    """
    return int(_total(program, traffic_of))


def _flops_of(program: Program, i: Instruction, computation: str) -> float:
    if i.operation == "fusion":
        return sum(_flops_of(program, inner, i.called()[0]) for inner in program.fused(i))
    if i.operation not in ("dot", "convolution"):
        return 0.0
    left, right = (dims(program.by_name(computation)[name].shape) for name in i.operands)
    out = dims(i.shape)
    if i.operation == "dot":
        contracted = i.find(r"lhs_contracting_dims=\{([\d,]*)\}")
        return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in contracted.split(",") if d)
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


def traffic_of(program: Program, i: Instruction, computation: str) -> int:
    """Bytes that one execution of an instruction reads and writes."""
    if i.operation in _FREE or i.operation.endswith("-done") or '"AllocateBuffer"' in i.attributes:
        return 0
    defined, written = program.by_name(computation), hbm_bytes(i.shape)
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
    for parameter in program.computations[fused]:
        if parameter.operation != "parameter":
            continue
        names, total, is_whole = {parameter.name}, 0, False
        for i in program.computations[fused]:
            if not names & set(i.operands):
                continue
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
    root = program.computations[fused][-1]
    updates = []
    for name in root.operands if root.operation == "tuple" else [root.name]:
        defined = program.by_name(fused)
        i = defined[name]
        while i.operation in ("bitcast", "fusion"):
            if i.operation == "bitcast":
                i = defined[i.operands[0]]
            else:  # nested
                defined, i = program.by_name(i.called()[0]), program.fused(i)[-1]
        if i.operation == "dynamic-update-slice":
            updates.append((padded_bytes(i.shape), padded_bytes(defined[i.operands[1]].shape)))
    return updates
