"""Learning-rate schedules as functions of a run's progress, a fraction from 0 to 1."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_mlm.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, begin: Any, end: Any) -> jax.Array:
    """Learning rate, for a peak of 1, of a step that advances the progress from `begin` to `end`.

    It rises linearly from 0 during the warm-up, and then follows the schedule to `final_lr_fraction` at the end.
    """
    warmup, final = config.warmup_fraction, config.final_lr_fraction
    decayed = jnp.clip((begin - warmup) / max(1.0 - warmup, 1e-6), 0.0, 1.0)  # fraction of the time after the warm-up
    left = {
        "constant": lambda: jnp.ones_like(decayed),
        "linear": lambda: 1.0 - decayed,
        "cosine": lambda: 0.5 * (1.0 + jnp.cos(jnp.pi * decayed)),
        "wsd": lambda: jnp.minimum(1.0, (1.0 - jnp.minimum(begin, 1.0)) / max(config.decay_fraction, 1e-6)),
    }[config.schedule]()
    ramp = jnp.minimum(1.0, end / warmup) if warmup else 1.0  # by `end`, so that the first step's rate is not 0
    return ramp * (left if config.schedule == "constant" else final + (1.0 - final) * left)
