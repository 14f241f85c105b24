"""How long a train step takes at least, and at most if all else is as it should be: the roofline model
(doi:10.1145/1498765.1498785) with the networks as further roofs.

  - Matmuls run at the chip's bfloat16 peak; model.remat = full adds a third, for the second forward pass.
  - Memory: what the compiled program reads and writes, at full bandwidth.
  - Collectives are rings on the links that their group spans; those between slices share the chip's part of the host's
    network. Between two cores of a chip they are free.
  - At best all of these run at the same time, and the slowest of them is the step; at worst one after another.

Latencies, the host, and units that are half filled are left out.
"""

from typing import NamedTuple

from flax_mlm.config.schema import Config
from flax_mlm.distributed import chips
from flax_mlm.planning.compile import CompiledStep


class Roofline(NamedTuple):
    """Seconds of a step."""

    compute: float
    memory: float
    links: float  # between chips of a slice
    network: float  # between slices

    @property
    def best(self) -> float:
        """All at the same time."""
        return max(self)

    @property
    def worst(self) -> float:
        """One after another."""
        return sum(self)


def estimate(found: CompiledStep, config: Config, chip: chips.Chip) -> Roofline:
    """The roofs of one step; what is not known of the chip or was not compiled counts 0."""
    of_device = found.chips / found.devices
    again = 4 / 3 if config.model.remat == "full" else 1.0
    links = network = 0.0
    for one in found.collectives:
        if one["axes"] == ["slices"]:
            network += one["sent"] / (chip.network * of_device)
        elif one["links"]:
            links += one["sent"] / (chip.link * one["links"] * of_device)
    return Roofline(
        compute=again * found.flops / (chip.flops * found.chips),
        memory=found.traffic / (chip.bandwidth * of_device),
        links=links,
        network=network,
    )


def mfu(found: CompiledStep, chip: chips.Chip, seconds: float) -> float:
    """Model FLOPs utilisation of a step that takes so long (arXiv:2204.02311, appendix B)."""
    return found.flops / seconds / (chip.flops * found.chips)
