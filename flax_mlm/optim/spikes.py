"""Loss spikes: a loss or gradient norm far above its running mean, and what to do about it.

Following ZClip (arXiv:2504.02507) for the statistics and the clipping, OLMo-core's skip-step optimizers for leaving
out the update, and PaLM (arXiv:2204.02311 §5.1) for going back and leaving out the batches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_WARMUP = 25  # steps that only fill the statistics
_WEIGHT = 0.03  # of a new value in the running mean


class Running(NamedTuple):
    """Statistics of (loss, gradient norm), part of the train state."""

    steps: jax.Array  # int32, finite ones seen
    mean_2: jax.Array  # float32
    variance_2: jax.Array  # float32


def start() -> Running:
    """No values yet."""
    return Running(jnp.zeros((), jnp.int32), jnp.zeros(2), jnp.zeros(2))


def z_scores(running: Running, values_2: jax.Array) -> jax.Array:
    """How many standard deviations above the mean each value lies, (2,); 0 during the warm-up."""
    z_2 = (values_2 - running.mean_2) * jax.lax.rsqrt(running.variance_2 + 1e-12)
    return jnp.where((running.steps >= _WARMUP) & (z_2 > 0), z_2, 0.0)


def largest_norm(running: Running, values_2: jax.Array, threshold: float) -> jax.Array:
    """The norm that a gradient is cut to when it spikes, else infinity. The further out, the more is cut: a norm of
    score z gets the score threshold² / z (ZClip, equation 5)."""
    z = z_scores(running, values_2)[1]
    deviation = jnp.sqrt(running.variance_2[1])
    cut = running.mean_2[1] + threshold**2 / jnp.maximum(z, 1e-6) * deviation
    return jnp.where(z > threshold, cut, jnp.inf)


def updated(running: Running, values_2: jax.Array, threshold: float) -> Running:
    """The statistics with one more step. A spike counts as if it lay at the threshold, so that they follow losses that
    have risen for good; a step that is not finite does not count.

    Args:
      values_2: loss and gradient norm, with ZClip after it was cut.
    """
    limit_2 = running.mean_2 + threshold * jnp.sqrt(running.variance_2)
    value_2 = jnp.where(z_scores(running, values_2) > threshold, limit_2, values_2)
    # A plain average at first, then an exponential one.
    weight = jnp.maximum(1.0 / (running.steps + 1).astype(jnp.float32), _WEIGHT)
    away_2 = value_2 - running.mean_2
    mean_2 = running.mean_2 + weight * away_2
    variance_2 = (1.0 - weight) * (running.variance_2 + weight * jnp.square(away_2))
    new = Running(running.steps + 1, mean_2, variance_2)
    return jax.tree.map(lambda n, o: jnp.where(jnp.isfinite(values_2).all(), n, o), new, running)
