"""Roofline model of a train step (doi:10.1145/1498765.1498785), with the networks as further roofs.

  - Matmuls run at the chip's bfloat16 peak; model.remat = full adds a third, for the second forward pass.
  - Memory: the bytes that the compiled program reads and writes, at full bandwidth.
  - Collectives are rings on the links that their group spans; those between slices use the chip's part of the host's
    network. Between two cores of a chip they are free.
  - At best all of these overlap, and the slowest of them is the step; at worst nothing overlaps.

Latencies, the host, and partly filled units are ignored.
"""

from typing import NamedTuple

from flax_mlm.config.schema import Config
from flax_mlm.distributed import chips
from flax_mlm.planning.compile import CompiledStep


class Roofline(NamedTuple):
    """Seconds of a step, by roof."""

    compute: float
    memory: float
    links: float  # between chips of a slice
    network: float  # between slices

    @property
    def best(self) -> float:
        """Seconds with full overlap."""
        return max(self)

    @property
    def worst(self) -> float:
        """Seconds without overlap."""
        return sum(self)


def estimate(step: CompiledStep, config: Config, chip: chips.Chip) -> Roofline:
    """Estimates the roofs of a step; those that need the compiled program are 0 without it."""
    chips_per_device = step.chips / step.devices
    recomputation = 4 / 3 if config.model.remat == "full" else 1.0
    links = network = 0.0
    for c in step.collectives:
        if c["axes"] == ["slices"]:
            network += c["sent"] / (chip.network * chips_per_device)
        elif c["links"]:
            links += c["sent"] / (chip.link * c["links"] * chips_per_device)
    compute = recomputation * step.flops / (chip.flops * step.chips)
    return Roofline(compute, step.traffic / (chip.bandwidth * chips_per_device), links, network)


def mfu(step: CompiledStep, chip: chips.Chip, seconds: float) -> float:
    """Model FLOPs utilisation of a step of so many seconds (arXiv:2204.02311, appendix B)."""
    return step.flops / seconds / (chip.flops * step.chips)
