"""Collectives of a compiled program: their kind, mesh axes, bytes and number a step."""

import math
import re
from typing import NamedTuple

import numpy as np

from flax_mlm.planning.cost import executed
from flax_mlm.planning.hlo import Instruction, Program, array_bytes, find, numbers, second_array

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_SCOPES = ("embeddings", "layers", "head", "loss", "optimizer", "fingerprint")


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
    totals: dict[Collective, int] = {}
    seen: set[tuple[str, ...]] = set()

    def add(kind: str, shape: str, i: Instruction, times: int) -> None:
        group = _group(i.attributes, sizes)
        indices = zip(mesh_shape, np.unravel_index(group, sizes), strict=True)
        if axes := tuple(axis for axis, index in indices if np.ptp(index)):
            size = sum(array_bytes(shape)) * (len(group) if kind == "reduce-scatter" else 1)
            collective = Collective(kind, axes, len(group), size, 0, _scope(i), tuple(group))
            totals[collective] = totals.get(collective, 0) + times

    for i, computation, times in executed(program):
        kind = i.operation.removesuffix("-start")
        if kind in _KINDS:
            # The result of a -start also contains its operand.
            add(kind, i.shape if kind == i.operation else second_array(i.shape), i, times)
        elif i.operation == "send" and "_xla_megascale_transfer_type" in i.attributes:
            kind = i.find(r'_transfer_type="(\w+)"').lower().replace("_", "-")
            collective = Collective(kind, ("slices",), slices, array_bytes(i.shape)[0], 0, "", ())
            totals[collective] = totals.get(collective, 0) + times
        elif i.operation == "fusion":
            # The TPU compiler writes a reduce-scatter as a fusion; an asynchronous collective is in several fusions.
            is_scatter = i.called()[0].startswith("all-reduce-scatter")
            for inner in program.fused(i):
                if inner.operation in _KINDS:
                    kind = "reduce-scatter" if is_scatter else inner.operation
                    key = (computation, kind, inner.find(r"channel_id=(\d+)"), _scope(inner))
                    if is_scatter or key not in seen:
                        seen.add(key)
                        add(kind, i.shape if is_scatter else inner.shape, inner, times)
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
        return [int(d) for d in re.findall(r"\d+", text[: text.index("}")])]
    if match := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):  # [groups, size]<=[dims]T(order)
        return _iota(match[3], match[4]).reshape(int(match[1]), int(match[2]))[0].tolist()
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
