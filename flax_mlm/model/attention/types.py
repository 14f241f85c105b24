"""Types that the attention kernels share."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

SAVED = "attention"  # checkpoint_name of what a kernel keeps for the backward pass, for recomputation policies

Drop = Callable[[jax.Array], jax.Array]  # zeroes entries at random and scales the others up


# Attention of every layer type, with their masks bound: (layer type, q, k, v, *, drop: Drop | None = None) ->
# softmax(q·k / sqrt(d)) · v, (B, L, H, d), with `drop` applied to the probabilities. The layer type, an int or
# int32 (), is an index into the windows that the kernel was built with.
Attend = Callable[..., jax.Array]

# (segment ids int32 (B, L), causal, window or None of each layer type) -> Attend; see masks.attention_mask
Kernel = Callable[[jax.Array, bool, Sequence[int | None]], Attend]


def switch_layer_type(build: Callable[[int | None], Callable[..., jax.Array]], windows: Sequence[int | None]) -> Attend:
    """Builds the attention of each layer type by itself, and chooses one at run time."""
    attends = [build(window) for window in windows]

    def attend(layer_type: Any, *qkv_BLHd: jax.Array, drop: Drop | None = None) -> jax.Array:
        branches = [functools.partial(attend, drop=drop) for attend in attends]
        return jax.lax.switch(layer_type, branches, *qkv_BLHd)

    return attend
