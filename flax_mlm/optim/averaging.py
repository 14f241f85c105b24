"""Averages of the weights over the steps. Where a run keeps one, it is what is evaluated, fine-tuned and exported.

Each is a running mean, one float32 copy of the parameters, laid out as they are. How much the newest weights count in
it follows from the number of the step alone, so nothing else has to be saved. A step whose update was left out counts
as one that changed nothing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from flax_mlm.config.schema import OptimizerConfig


def gradient_at(config: OptimizerConfig, params: Any, average: Any) -> Any:
    """The weights whose gradient is taken: `params`, but with schedule-free between them and their average."""
    if config.averages != "schedule_free":
        return params
    return jax.tree.map(lambda p, a: p + config.beta1 * (a - p), params, average)


def updated(config: OptimizerConfig, total_steps: int, step: jax.Array, average: Any, params: Any) -> Any:
    """The average, None where none is kept, with the weights in it that step number `step`, from 0, has made."""
    if average is None:
        return None
    share = update_weight(config, total_steps, step)
    return jax.tree.map(lambda a, p: a + share * (p - a), average, params)


def update_weight(config: OptimizerConfig, total_steps: int, step: jax.Array) -> jax.Array:
    """What share of the average is the weights that step int32 `step`, from 0, has made; float32."""
    done = step + 1
    return {
        "ema": lambda: _ema(config, step.astype(jnp.float32)),
        "lawa": lambda: _lawa(config, total_steps, done),
        "schedule_free": lambda: _schedule_free(config, total_steps, done.astype(jnp.float32)),
    }[config.averages]()


def _ema(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """Exponential moving average, with less decay at first, so that it forgets the weights that the run began with:
    after n steps it looks back over n / 9 of them (as TensorFlow's `ExponentialMovingAverage` with `num_updates`)."""
    return 1.0 - jnp.minimum(config.ema_decay, (1.0 + step) / (10.0 + step))


def _lawa(config: OptimizerConfig, total_steps: int, done: jax.Array) -> jax.Array:
    """Latest weight averaging (arXiv:2209.14981, arXiv:2306.03241): the mean of the last `lawa_count` snapshots, taken
    every `lawa_every` steps, counted back from the last step.

    A window that slides would have to keep its snapshots. This one fills and begins anew: in the course of a run it
    holds the last 1 to `lawa_count` of them, and at its end, for so they are counted, all.
    """
    every, count = config.lawa_every, config.lawa_count
    windows_place, until_snapshot = jnp.divmod(total_steps - done, every)
    first = (total_steps - 1) % every + 1
    taken = (done - first) // every + 1  # this one included
    held = jnp.minimum(count - windows_place % count, taken).astype(jnp.float32)
    share = jnp.where(until_snapshot == 0, 1.0 / jnp.maximum(held, 1.0), 0.0)
    return jnp.where(done < first, 1.0, share)


def _schedule_free(config: OptimizerConfig, total_steps: int, done: jax.Array) -> jax.Array:
    """Schedule-free (arXiv:2405.15682): a mean in which each step counts as the square of its
    learning rate, which rises linearly in the warm-up and is constant then."""
    warmup = max(1.0, config.warmup_fraction * total_steps)
    n = jnp.minimum(done, math.floor(warmup))
    all_steps = (n / warmup) * ((n + 1.0) / warmup) * (2.0 * n + 1.0) / 6.0 + (done - n)
    return jnp.square(jnp.minimum(done / warmup, 1.0)) / all_steps
