"""Rotary position embeddings (arXiv:2104.09864)."""

import jax
import jax.numpy as jnp

Rotary = tuple[jax.Array, jax.Array]  # cosines and sines


def rotary_table(positions_BL: jax.Array, head_width: int, theta: float) -> Rotary:
    """Computes the cosines and sines of every position's angles, float32 (B, L, 1, head_width / 2)."""
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = (positions_BL.astype(jnp.float32)[..., None] * frequencies[None, None])[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLHd: jax.Array, table: Rotary) -> jax.Array:
    """Rotates each pair (x[i], x[i + d/2]) by its position's angle; computed in float32, returned in x's dtype."""
    cos, sin = table
    x = x_BLHd.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    # perf(xla-cpu): a sum of two products; concatenating two rotated halves would run on one core.
    cos = jnp.concatenate([cos, cos], axis=-1)
    sin = jnp.concatenate([-sin, sin], axis=-1)
    return (x * cos + jnp.concatenate([second, first], axis=-1) * sin).astype(x_BLHd.dtype)
