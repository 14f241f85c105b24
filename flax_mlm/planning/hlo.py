"""What a compiled program does in one call: its collectives, its matmuls, and its traffic with the chip's memory.

Read from XLA's text of the optimised program (`jax.stages.Compiled.as_text`), for XLA's own cost analysis counts the
body of a loop once. What a loop contains counts as often as it turns.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "c64": 64} | {f"{t}{n}": n for t in "suf" for n in (4, 8, 16, 32, 64)}
# Move nothing themselves: names for what is there already, or frames around instructions that are counted.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call", "optimization-barrier", "opt-barrier", "recv", "send", "async-start"),
}

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


class Instruction(NamedTuple):
    """One line of the text."""

    name: str
    shape: str  # with layouts; a tuple's is in parentheses
    operation: str
    operands: list[str]
    attributes: str


class Collective(NamedTuple):
    """Collectives of one kind, size and group, and from one place of the program."""

    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute
    axes: tuple[str, ...]  # of the mesh, that it crosses; ("slices",) between TPU slices
    size: int  # devices, or slices, that take part together
    bytes: int  # of the whole array: the gathered, or what is summed; per device
    times: int  # a step
    scope: str  # named scope that it comes from, such as layers or optimizer
    group: tuple[int, ...]  # the devices of one group, as places in the mesh; empty between slices

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step, as rings do it."""
        share = (self.size - 1) / self.size
        return self.times * self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


class Program:
    """The text, taken apart."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations[head[2]] = []
                if head[1]:
                    self.entry = head[2]
            elif line.startswith("  ") and " = " in line:
                current.append(_instruction(line))

    def walk(self, visit: Callable[[Instruction, str, int], None], name: str = "", times: int = 1) -> None:
        """Calls `visit(instruction, computation, times a step)` for all that is executed; a fusion is one of them."""
        name = name or self.entry
        for instruction in self.computations[name]:
            visit(instruction, name, times)
            called = {key: _called(instruction.attributes, key) for key in ("body", "condition", "to_apply", "calls")}
            if instruction.operation == "while":
                self.walk(visit, called["body"][0], times * self.turns(called["condition"][0]))
            elif instruction.operation == "conditional":
                branches = _called(instruction.attributes, "branch_computations|(?:true|false)_computation")
                self.walk(visit, max(branches, key=self._size), times)
            elif instruction.operation == "call":
                self.walk(visit, called["to_apply"][0], times)
            elif instruction.operation == "async-start":
                self.walk(visit, called["calls"][0], times)

    def turns(self, condition: str) -> int:
        """How often a loop turns that counts from 0 to the constant in its condition, as those of `lax.scan` do."""
        found = [1]
        for i in self.computations[condition]:
            if i.operation == "constant" and re.match(r"[su]32\[\]", i.shape):
                found.append(int(i.operands[0]))
            elif i.operation == "fusion":
                found.append(self.turns(_called(i.attributes, "calls")[0]))
        return max(found)

    @functools.cache  # noqa: B019  (a program lives as long as the process that reads it)
    def named(self, computation: str) -> dict[str, Instruction]:
        return {i.name: i for i in self.computations[computation]}

    def _size(self, computation: str) -> int:
        return sum(self.traffic_of(i, computation) for i in self.computations[computation])

    def _total(self, of: Callable[[Instruction, str], float]) -> float:
        """The sum of `of(instruction, computation)` over all that one device executes in a step."""
        total = 0.0

        def visit(instruction: Instruction, computation: str, times: int) -> None:
            nonlocal total
            total += times * of(instruction, computation)

        self.walk(visit)
        return total

    def count(self, *operations: str) -> int:
        """How often one device executes one of these in a step, each fusion as one."""
        return int(self._total(lambda i, _: i.operation in operations))

    def flops(self) -> float:
        """Additions and multiplications in one device's matmuls in a step; the text has none of a Pallas kernel's."""
        return self._total(self._flops_of)

    def _flops_of(self, i: Instruction, computation: str) -> float:
        if i.operation == "fusion":
            fused = _called(i.attributes, "calls")[0]
            return sum(self._flops_of(inner, fused) for inner in self.computations[fused])
        if i.operation not in ("dot", "convolution"):
            return 0.0
        left, right, out = (*(_dims(self.named(computation)[name].shape) for name in i.operands), _dims(i.shape))
        if i.operation == "dot":
            contracted = _find(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
            return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in contracted.split(",") if d)
        # The TPU compiler's matmuls; dimensions that both sides have are among the spatial ones.
        of_left, of_right, of_out = re.split("_|->", _find(r"dim_labels=([^\s,]+)", i.attributes))
        sides, window = ((left, of_left), (right, of_right), (out, of_out)), _find(r"window=\{([^}]*)\}", i.attributes)
        positions = 1
        for at, letter in enumerate(sorted(filter(str.isdigit, of_left))):
            positions *= _products([sizes[labels.index(letter)] for sizes, labels in sides], at, window)
        parts = [int(_find(rf"{kind}_group_count=(\d+)", i.attributes) or 1) for kind in ("feature", "batch")]
        inner = left[of_left.index("f")] * left[of_left.index("b")] // math.prod(parts)
        return 2.0 * inner * right[of_right.index("o")] * positions

    def traffic(self) -> int:
        """Bytes that one device reads from and writes to its memory (HBM) in a step, tiles included.

        What the compiler keeps in on-chip memory does not count, nor does what a fusion hands on inside.
        """
        return int(self._total(self.traffic_of))

    def traffic_of(self, i: Instruction, computation: str) -> int:
        if i.operation in _FREE or i.operation.endswith("-done") or '"AllocateBuffer"' in i.attributes:
            return 0
        defined = self.named(computation)
        operands = [_in_memory(defined[name].shape) if name in defined else 0 for name in i.operands]
        if i.operation == "dynamic-slice":
            return 2 * min(_in_memory(i.shape), operands[0])
        if i.operation == "dynamic-update-slice":
            return 2 * min(operands[1], _in_memory(i.shape))
        if i.operation == "gather":
            return 2 * _in_memory(i.shape)
        if i.operation != "fusion":
            return _in_memory(i.shape) + (0 if i.operation.endswith("-start") else sum(operands))
        fused = _called(i.attributes, "calls")[0]
        written = _in_memory(i.shape)
        for at, part in self._parts_of(fused).items():
            operands[at] = min(operands[at], part) if at < len(operands) else 0
        for whole, part in self._updates_of(fused):
            written -= max(0, min(whole, written) - part)
        return written + sum(operands)

    @functools.cache  # noqa: B019
    def _parts_of(self, fused: str) -> dict[int, int]:
        """Which parameters of a fusion are read in parts alone, and how many bytes of them. An array that a part is
        written into is not read."""
        parts: dict[int, int] = {}
        for parameter in self.computations[fused]:
            if parameter.operation != "parameter":
                continue
            names, total, whole = {parameter.name}, 0, False
            for i in self.computations[fused]:
                if not names & set(i.operands):
                    continue
                if i.operation == "bitcast" or self._only_tiles(i):
                    names.add(i.name)
                elif i.operation == "fusion":  # one inside the other
                    inner = self._parts_of(_called(i.attributes, "calls")[0])
                    read = [inner.get(at) for at, name in enumerate(i.operands) if name in names]
                    whole |= None in read
                    total += sum(part or 0 for part in read)
                elif i.operation in ("dynamic-slice", "gather") and i.operands[0] in names:
                    total += _padded(i.shape)
                elif not (i.operation == "dynamic-update-slice" and i.operands[0] in names):
                    whole = True
            if not whole:
                parts[int(parameter.operands[0])] = total
        return parts

    def _only_tiles(self, i: Instruction) -> bool:
        """Whether an instruction of a fusion has the array it is given, with other tiles (from tpu7x on)."""
        if i.operation != "fusion" or "output_to_operand_aliasing" not in i.attributes:
            return False
        (fused,) = _called(i.attributes, "calls")
        return [inner.operation for inner in self.computations[fused]] == ["parameter", "copy"]

    @functools.cache  # noqa: B019
    def _updates_of(self, fused: str) -> list[tuple[int, int]]:
        """Bytes of each array of a fusion's result of which a part alone is written, and of that part."""
        root = self.computations[fused][-1]
        found = []
        for name in root.operands if root.operation == "tuple" else [root.name]:
            defined = self.named(fused)
            i = defined[name]
            while i.operation in ("bitcast", "fusion"):
                if i.operation == "bitcast":
                    i = defined[i.operands[0]]
                else:  # one inside the other
                    inner = _called(i.attributes, "calls")[0]
                    defined, i = self.named(inner), self.computations[inner][-1]
            if i.operation == "dynamic-update-slice":
                found.append((_padded(i.shape), _padded(defined[i.operands[1]].shape)))
        return found

    def collectives(self, mesh_shape: dict[str, int], slices: int = 1) -> list[Collective]:
        """The collectives of a step, equal ones added up.

        Args:
          mesh_shape: axis -> size, in the order of the devices' numbers; the first axis crosses the slices.
          slices: TPU slices; the text is of one of them.
        """
        sizes = list(mesh_shape.values())
        sizes[0] //= slices
        found: dict[Collective, int] = {}
        seen: set[tuple[str, ...]] = set()

        def add(kind: str, size_of: str, attributes: str, times: int) -> None:
            group = _group(attributes, sizes)
            axes = tuple(axis for axis, c in zip(mesh_shape, np.unravel_index(group, sizes), strict=True) if np.ptp(c))
            if not axes:
                return
            size = sum(_logical(size_of)) * (len(group) if kind == "reduce-scatter" else 1)
            one = Collective(kind, axes, len(group), size, 0, _scope(attributes), tuple(group))
            found[one] = found.get(one, 0) + times

        def visit(i: Instruction, computation: str, times: int) -> None:
            kind = i.operation.removesuffix("-start")
            if kind in _KINDS:
                # The result of a -start names what goes in, too.
                shape = i.shape if kind == i.operation else _second(i.shape)
                add(kind, shape, i.attributes, times)
            elif i.operation == "send" and "_xla_megascale_transfer_type" in i.attributes:
                kind = _find(r'_transfer_type="(\w+)"', i.attributes).lower().replace("_", "-")
                size = _logical(i.shape)[0]
                one = Collective(kind, ("slices",), slices, size, 0, "", ())
                found[one] = found.get(one, 0) + times
            elif i.operation == "fusion":
                fused = _called(i.attributes, "calls")[0]
                for inner in self.computations[fused]:
                    if inner.operation not in _KINDS:
                        continue
                    # The TPU compiler's way to say reduce-scatter; and an asynchronous one is in several fusions.
                    scatters = fused.startswith("all-reduce-scatter")
                    kind = "reduce-scatter" if scatters else inner.operation
                    which = (computation, kind, _find(r"channel_id=(\d+)", inner.attributes), _scope(inner.attributes))
                    if scatters or which not in seen:
                        seen.add(which)
                        add(kind, i.shape if scatters else inner.shape, inner.attributes, times)

        self.walk(visit)
        return [one._replace(times=times) for one, times in found.items()]


def _instruction(line: str) -> Instruction:
    name, rest = line.strip().removeprefix("ROOT ").lstrip("%").split(" = ", 1)
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    operation, rest = rest.split("(", 1)
    end = _closing("(" + rest) - 2
    return Instruction(name, shape, operation, _split(rest[:end]), rest[end + 1 :])


def _closing(text: str) -> int:
    """The place behind the parenthesis that closes the first."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if not depth:
            return at + 1
    return len(text)


def _split(operands: str) -> list[str]:
    """The operands' names; of a constant or parameter, its text."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(operands + ","):
        depth += (character in "({[") - (character in ")}]")
        if character == "," and not depth:
            parts.append(operands[start:at].split("*/")[-1].strip().split(" ")[-1].lstrip("%"))
            start = at + 1
    return [part for part in parts if part]


def _called(attributes: str, keys: str) -> list[str]:
    """The computations that the attributes of these names (a pattern) call."""
    values = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", attributes)
    return [name.strip("{} %") for value in values for name in value.split(",")]


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def _second(shape: str) -> str:
    """The second array of a tuple's shape."""
    arrays = [m[0] for m in _ARRAY.finditer(shape)]
    return arrays[1] if len(arrays) > 1 else shape


def _scope(attributes: str) -> str:
    """The innermost of our named scopes in an instruction's op_name; "" where it has none."""
    parts = re.findall(r"[\w]+", _find(r'op_name="([^"]*)"', attributes))
    ours = [p for p in parts if p in ("embeddings", "layers", "head", "loss", "optimizer", "fingerprint")]
    return ours[-1] if ours else ""


def _logical(shape: str) -> list[int]:
    """Bytes of each array of a shape."""
    sizes = []
    for kind, dims, _, _ in _ARRAY.findall(shape):
        if kind in _BITS:
            sizes.append(math.prod(int(d) for d in dims.split(",") if d) * _BITS[kind] // 8)
    return sizes


def _dims(shape: str) -> list[int]:
    """The sizes of an array."""
    match = _ARRAY.search(shape)
    return [int(d) for d in match[2].split(",") if d] if match else []


def _products(sizes: list[int], at: int, window: str) -> int:
    """How many pairs of an element and a kernel's element a convolution multiplies along its spatial dimension `at`,
    of which these are the sizes in its input, kernel and output."""
    size, kernel, out = sizes

    def of(name: str, default: str) -> str:
        return _find(rf"\b{name}=(\S+)", window).split("x")[at] if f"{name}=" in window else default

    stride, widened, spread = (int(of(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(of("pad", "0_0").split("_")[0])
    places = [o * stride + k * spread - before for o in range(out) for k in range(kernel)]
    return sum(0 <= place <= (size - 1) * widened and place % widened == 0 for place in places)


def _padded(shape: str) -> int:
    """Bytes of all arrays of a shape, with the padding of their first tile."""
    total = 0
    for kind, dims, order, layout in _ARRAY.findall(shape):
        sizes = [int(d) for d in dims.split(",") if d]
        tile = [int(t) for t in _find(r"T\(([\d,]+)\)", layout).split(",") if t]
        for place, size in zip([int(o) for o in order.split(",") if o], reversed(tile), strict=False):
            sizes[place] = -(-sizes[place] // size) * size
        total += math.prod(sizes) * _BITS.get(kind, 0) // 8
    return total


def _in_memory(shape: str) -> int:
    """As `_padded`, of the arrays in the chip's main memory: the others have a space S(...) in their layout."""
    return sum(_padded(m[0]) for m in _ARRAY.finditer(shape) if not re.search(r"S\([1-9]", m[0]))


def _group(attributes: str, sizes: list[int]) -> list[int]:
    """The devices of the first group."""
    if pairs := _find(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        return [int(d) for d in re.findall(r"\d+", pairs)][:2]
    text = _find(r"replica_groups=(mesh\[.*?\}|\{\{.*?\}\}|\[\S*)", attributes)
    if text.startswith("{{"):
        return [int(d) for d in re.findall(r"\d+", text[: text.index("}")])]
    if match := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):  # [groups, size]<=[dims]T(order)
        count, size, dims, order = match.groups()
        return _iota(dims, order).reshape(int(count), int(size))[0].tolist()
    names = re.findall(r"'(\w+)'=(\d+)", text)  # mesh['a'=4,'b'=4], device_ids=([4,4]T(1,0)) {'b'}
    if not names:
        return list(range(math.prod(sizes)))
    shape = [int(size) for _, size in names]
    numbers: np.ndarray = np.arange(math.prod(shape))
    if match := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", text):
        numbers = _iota(*match.groups())
    elif match := re.search(r"device_ids=\(?\[?([\d,]+)\]?\)?", text):
        numbers = np.array([int(d) for d in match[1].split(",")])
    crossed = re.findall(r"'(\w+)'", text[text.rindex("{") :])
    index = tuple(slice(None) if name in crossed else 0 for name, _ in names)
    return sorted(numbers.reshape(shape)[index].reshape(-1).tolist())


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = [int(d) for d in dims.split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose([int(o) for o in order.split(",")]) if order else numbers).reshape(-1)
