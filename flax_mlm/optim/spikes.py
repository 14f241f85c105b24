"""Loss spikes: steps whose loss or gradient norm is far above its running mean.

Statistics and clipping follow ZClip (arXiv:2504.02507), and skipped updates OLMo-core's skip-step optimizers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_WARMUP = 25  # steps during which nothing counts as a spike
_WEIGHT = 0.03  # of a new value in the running mean


class Running(NamedTuple):
    """Running statistics of (loss, gradient norm), part of the train state."""

    steps: jax.Array  # int32 (), steps that were finite
    mean_2: jax.Array  # float32
    variance_2: jax.Array  # float32


def init() -> Running:
    """Statistics of no steps."""
    return Running(jnp.zeros((), jnp.int32), jnp.zeros(2), jnp.zeros(2))


def z_scores(running: Running, values_2: jax.Array) -> jax.Array:
    """Standard deviations by which each value exceeds its mean, (2,); 0 below the mean and during the warm-up."""
    z_2 = (values_2 - running.mean_2) * jax.lax.rsqrt(running.variance_2 + 1e-12)
    return jnp.where((running.steps >= _WARMUP) & (z_2 > 0), z_2, 0.0)


def clip_norm(running: Running, values_2: jax.Array, threshold: float) -> jax.Array:
    """Norm to which a gradient is clipped when its norm spikes, else infinity.

    The higher the spike, the lower the norm: a z-score of z becomes threshold² / z (ZClip, equation 5).
    """
    z = z_scores(running, values_2)[1]
    deviation = jnp.sqrt(running.variance_2[1])
    clipped = running.mean_2[1] + threshold**2 / jnp.maximum(z, 1e-6) * deviation
    return jnp.where(z > threshold, clipped, jnp.inf)


def update(running: Running, values_2: jax.Array, threshold: float) -> Running:
    """Statistics after one more step.

    A spike counts as a value at the threshold, so that the statistics follow losses that stay high; a step that is not
    finite does not count.

    Args:
      values_2: loss and gradient norm, the norm after ZClip's clipping.
    """
    limit_2 = running.mean_2 + threshold * jnp.sqrt(running.variance_2)
    value_2 = jnp.where(z_scores(running, values_2) > threshold, limit_2, values_2)
    # A plain average at first, then an exponential one.
    weight = jnp.maximum(1.0 / (running.steps + 1).astype(jnp.float32), _WEIGHT)
    difference_2 = value_2 - running.mean_2
    mean_2 = running.mean_2 + weight * difference_2
    variance_2 = (1.0 - weight) * (running.variance_2 + weight * jnp.square(difference_2))
    new = Running(running.steps + 1, mean_2, variance_2)
    return jax.tree.map(lambda n, o: jnp.where(jnp.isfinite(values_2).all(), n, o), new, running)
