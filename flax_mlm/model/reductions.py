"""Reductions in a form that XLA:CPU computes fast."""

import jax
import jax.numpy as jnp

from flax_mlm.distributed.mesh import reshard_like


def sum_rows(x: jax.Array, vector: jax.Array) -> jax.Array:
    """Sums x (B, L, ...) over B and L in float32; returns it in the dtype and sharding of `vector` (...).

    This is the gradient of a vector that is broadcast to (B, L, ...).
    """
    # perf(xla-cpu): the barrier keeps it two sums, first over L; one sum over both is slower.
    total = jax.lax.optimization_barrier(x.astype(jnp.float32).sum(1)).sum(0).astype(vector.dtype)
    return reshard_like(total, vector)


def max_last_axis(x: jax.Array) -> jax.Array:
    """Computes the maximum over the last axis, without a derivative."""
    x = jax.lax.stop_gradient(x)
    if jax.typeof(x).sharding.spec[-1] is not None:
        return x.max(-1)
    return jax.lax.platform_dependent(x, cpu=_max_by_halves, default=lambda x: x.max(-1))


def _max_by_halves(x: jax.Array) -> jax.Array:
    # perf(xla-cpu): max over an axis is slow; the elementwise maximum of two arrays runs at the speed of memory.
    while x.shape[-1] > 32:
        half = -(-x.shape[-1] // 2)
        x = jnp.maximum(x[..., :half], x[..., -half:])
    return x.max(-1)
