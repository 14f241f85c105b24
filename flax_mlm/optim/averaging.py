"""Averages of the weights over the steps. A run that keeps an average evaluates, fine-tunes and exports it.

An average is a running mean: one float32 copy of the parameters, laid out as they are. The weight of the newest
parameters follows from the number of the step alone, so a checkpoint stores nothing else. A skipped update counts as a
step that changed nothing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from flax_mlm.config.schema import OptimizerConfig


def gradient_params(config: OptimizerConfig, params: Any, average: Any) -> Any:
    """Parameters at which the gradient is taken: `params`; for schedule-free, between them and their average."""
    if config.averages != "schedule_free":
        return params
    return jax.tree.map(lambda p, a: p + config.beta1 * (a - p), params, average)


def update_average(config: OptimizerConfig, total_steps: int, step: jax.Array, average: Any, params: Any) -> Any:
    """Average after a step; None where none is kept.

    Args:
      step: int32 number of the step, from 0.
      params: the parameters that the step has made.
    """
    if average is None:
        return None
    weights = {"ema": _ema, "lawa": _lawa, "schedule_free": _schedule_free}
    weight = weights[config.averages](config, total_steps, step + 1)  # of the newest parameters, in [0, 1]
    return jax.tree.map(lambda a, p: a + weight * (p - a), average, params)


def _ema(config: OptimizerConfig, total_steps: int, done: jax.Array) -> jax.Array:
    """Exponential moving average, with less decay at first, so that it forgets the initial parameters.

    After n steps it looks back over n / 9 of them, as TensorFlow's `ExponentialMovingAverage` with `num_updates`.
    """
    return 1.0 - jnp.minimum(config.ema_decay, done.astype(jnp.float32) / (9 + done).astype(jnp.float32))


def _lawa(config: OptimizerConfig, total_steps: int, done: jax.Array) -> jax.Array:
    """Latest weight averaging (arXiv:2209.14981, arXiv:2306.03241): mean of the last `lawa_count` snapshots.

    Snapshots are `lawa_every` steps apart, counted back from the last step. A sliding window would have to store its
    snapshots. This window empties each time that it is full: during the run it holds the last 1 to `lawa_count`
    snapshots, and at the end, since they are counted from there, exactly `lawa_count`. Before the first snapshot the
    average is the newest parameters.
    """
    every, count = config.lawa_every, config.lawa_count
    snapshots_left, steps_to_snapshot = jnp.divmod(total_steps - done, every)
    first = (total_steps - 1) % every + 1  # the step of the first snapshot
    snapshots = (done - first) // every + 1
    in_window = jnp.minimum(count - snapshots_left % count, snapshots).astype(jnp.float32)
    weight = jnp.where(steps_to_snapshot == 0, 1.0 / jnp.maximum(in_window, 1.0), 0.0)
    return jnp.where(done < first, 1.0, weight)


def _schedule_free(config: OptimizerConfig, total_steps: int, done: jax.Array) -> jax.Array:
    """Schedule-free (arXiv:2405.15682): mean weighted by the square of each step's learning rate.

    The learning rate rises linearly during the warm-up and is constant afterwards.
    """
    warmup, done = max(1.0, config.warmup_steps or config.warmup_fraction * total_steps), done.astype(jnp.float32)
    n = jnp.minimum(done, math.floor(warmup))
    sum_of_squares = (n / warmup) * ((n + 1.0) / warmup) * (2.0 * n + 1.0) / 6.0 + (done - n)
    return jnp.square(jnp.minimum(done / warmup, 1.0)) / sum_of_squares
