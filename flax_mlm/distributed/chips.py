"""Peak numbers of accelerators, from their makers' data sheets.

TPUs: docs.cloud.google.com/tpu/docs, the pages v4, v5e, v5p, v6e and tpu7x. GPUs: NVIDIA's data sheets, SXM forms,
without sparsity.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Chip(NamedTuple):
    """Peak numbers of one chip, which JAX may show as one device or as several."""

    name: str
    kind: str  # substring of JAX's `device_kind`, in lower case
    flops: float  # bfloat16, dense, FLOP/s
    memory: float  # bytes of HBM
    bandwidth: float  # HBM, bytes/s
    link: float = 0.0  # one link to a neighbour in the slice (ICI), bytes/s in each direction
    network: float = 0.0  # to other slices, bytes/s in each direction
    wraps: int = 0  # a dimension of a slice is a ring if its size is a multiple of this, else a line
    together: bool = False  # rings exist only if the sizes of all dimensions are such multiples


_G = 2**30
# In the order of the search: "TPU v5 lite" is not a "TPU v5", as JAX names the v5p.
CHIPS = (
    Chip("v4", "tpu v4", 275e12, 32 * _G, 1.23e12, 50e9, 3.1e9, 4, True),
    Chip("v5e", "tpu v5 lite", 197e12, 16 * _G, 0.82e12, 50e9, 3.1e9, 16),
    Chip("v5p", "tpu v5", 459e12, 95 * _G, 2.77e12, 100e9, 6.2e9, 4, True),
    Chip("v6e", "tpu v6 lite", 918e12, 32 * _G, 1.64e12, 100e9, 12.5e9, 16),
    Chip("tpu7x", "tpu7x", 2307e12, 192 * _G, 7.38e12, 100e9, 12.5e9, 4, True),
    Chip("a100", "a100", 312e12, 80e9, 2.04e12),
    Chip("h100", "h100", 989e12, 80e9, 3.35e12),
    Chip("h200", "h200", 989e12, 141e9, 4.8e12),
    Chip("b200", "b200", 2250e12, 180e9, 8e12),
    Chip("l4", "l4", 121e12, 24e9, 0.3e12),
)


def of_kind(device_kind: str) -> Chip | None:
    """Returns the chip with a `device_kind` of JAX; None if it is unknown."""
    kind = device_kind.lower()
    return next((chip for chip in CHIPS if re.search(rf"\b{chip.kind}\b", kind)), None)


def count(devices: Sequence[Any] | np.ndarray) -> int:
    """Counts the chips of these devices: some TPUs show two devices per chip."""
    if devices[0].platform != "tpu":  # coordinates of a GPU are unique only within its process
        return len(devices)
    return len({(getattr(device, "slice_index", 0), *device.coords) for device in devices})


def peak_flops(devices: Sequence[Any] | np.ndarray) -> float | None:
    """Sums the bfloat16 peak of the devices' chips, FLOP/s; None if the chip is unknown."""
    chip = of_kind(devices[0].device_kind)
    return chip.flops * count(devices) if chip else None
