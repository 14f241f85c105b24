"""Parser of XLA's text of an optimised program (`jax.stages.Compiled.as_text`), and sizes of the arrays in it."""

import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "c64": 64} | {f"{t}{n}": n for t in "suf" for n in (4, 8, 16, 32, 64)}
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


class Instruction(NamedTuple):
    """One line of the text."""

    name: str
    shape: str  # with layouts; in parentheses for a tuple
    operation: str
    operands: list[str]  # names; for a constant or parameter, its text
    attributes: str

    def find(self, pattern: str) -> str:
        """Returns the pattern's group in the attributes, "" without a match."""
        return find(pattern, self.attributes)

    def called(self, keys: str = "calls") -> list[str]:
        """Names of the computations that the attributes `keys` (a pattern) call."""
        values = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [name.strip("{} %") for value in values for name in value.split(",")]


class Program:
    """Computations of a program: name -> name of an instruction -> instruction."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations[head[2]] = {}
                if head[1]:
                    self.entry = head[2]
            elif line.startswith("  ") and " = " in line:
                instruction = _parse(line)
                current[instruction.name] = instruction

    def fused(self, fusion: Instruction) -> list[Instruction]:
        """Instructions inside a fusion."""
        return list(self.computations[fusion.called()[0]].values())

    def trip_count(self, condition: str) -> int:
        """Number of iterations of a loop that counts from 0 to the constant in its condition, as `lax.scan` does."""
        counts = [1]
        for i in self.computations[condition].values():
            if i.operation == "constant" and re.match(r"[su]32\[\]", i.shape):
                counts.append(int(i.operands[0]))
            elif i.operation == "fusion":
                counts.append(self.trip_count(i.called()[0]))
        return max(counts)


def _parse(line: str) -> Instruction:
    name, text = line.strip().removeprefix("ROOT ").lstrip("%").split(" = ", 1)
    rest = _split(text[1:])[1] if text.startswith("(") else text[text.index(" ") :]
    shape = text.removesuffix(rest)
    operation, text = rest.lstrip().split("(", 1)
    operands, attributes = _split(text)
    names = [operand.split("*/")[-1].strip().split(" ")[-1].lstrip("%") for operand in operands]
    return Instruction(name, shape, operation, list(filter(None, names)), attributes)


def _split(text: str) -> tuple[list[str], str]:
    """Splits at commas, up to the parenthesis that closes; returns the parts and what is behind it."""
    parts, depth, start = [], 0, 0
    for bracket in re.finditer(r"[(){}\[\],]", text):
        if not depth and bracket[0] in ",)":
            parts.append(text[start : bracket.start()])
            start = bracket.end()
            if bracket[0] == ")":
                break
        depth += (bracket[0] in "({[") - (bracket[0] in ")}]")
    return parts, text[start:]


def find(pattern: str, text: str) -> str:
    """Returns the pattern's group in a text, "" without a match."""
    match = re.search(pattern, text)
    return match[1] if match else ""


def numbers(text: str | None) -> list[int]:
    """Parses comma-separated numbers."""
    return [int(n) for n in (text or "").split(",") if n]


def dims(shape: str) -> list[int]:
    """Sizes of an array's dimensions."""
    return numbers(find(r"\w\[([\d,]*)\]", shape))


def array_bytes(shape: str) -> list[int]:
    """Bytes of each array of a shape, without padding."""
    return [math.prod(numbers(size)) * _BITS[kind] // 8 for kind, size, *_ in _ARRAY.findall(shape) if kind in _BITS]


def padded_bytes(shape: str) -> int:
    """Bytes of all arrays of a shape, padded to whole tiles."""
    total = 0
    for kind, size, order, layout in _ARRAY.findall(shape):
        sizes, tile = numbers(size), numbers(find(r"T\(([\d,]+)\)", layout))
        for dim, tile_size in zip(numbers(order), reversed(tile), strict=False):
            sizes[dim] = -(-sizes[dim] // tile_size) * tile_size
        total += math.prod(sizes) * _BITS.get(kind, 0) // 8
    return total


def hbm_bytes(shape: str) -> int:
    """Padded bytes of the arrays in main memory; a memory space S(...) in a layout marks on-chip memory."""
    return sum(padded_bytes(m[0]) for m in _ARRAY.finditer(shape) if not re.search(r"S\([1-9]", m[0]))
