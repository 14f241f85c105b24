"""Types that the attention kernels share."""

from collections.abc import Callable
from typing import Protocol

import jax

SAVED = "attention"  # checkpoint_name of what a kernel keeps for the backward pass, for recomputation policies

Drop = Callable[[jax.Array], jax.Array]  # zeroes entries at random and scales the others up


class Attend(Protocol):
    """Attention of one layer type, its mask already bound."""

    def __call__(self, q_BLHd: jax.Array, k_BLHd: jax.Array, v_BLHd: jax.Array, drop: Drop | None = None) -> jax.Array:
        """Returns softmax(q·k / sqrt(d)) · v, (B, L, H, d), with `drop` applied to the probabilities."""


# (segment ids int32 (B, L), causal, window or None) -> Attend; see masks.attention_mask for the three
Kernel = Callable[[jax.Array, bool, int | None], Attend]
