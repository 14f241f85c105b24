"""Gradients of the mean loss over a global batch, in three ways: at once, accumulated, or with reproducible bits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_mlm.config.schema import TrainConfig
from flax_mlm.distributed.batches import split_microbatches
from flax_mlm.distributed.deterministic import sum_groups
from flax_mlm.objectives.losses import Loss
from flax_mlm.training.state import Metrics

# (parameters, counts over the global batch, (Targets, dropout keys)) -> (gradient, metrics); both are sums over the
# rows of terms that are divided by the counts, so that the results of parts of the batch add up
Gradient = Callable[[Any, Any, Any], tuple[Any, Metrics]]


def choose_gradient(config: TrainConfig, loss: Loss) -> Gradient:
    """Gradient of `loss` in the way that the config asks for."""

    def mean_loss(params: Any, counts: Any, rows: Any) -> tuple[jax.Array, Metrics]:
        return loss.total(loss.predict(params, *rows), counts)

    whole_batch: Gradient = jax.grad(mean_loss, has_aux=True)
    if config.reproducible:
        return functools.partial(deterministic, whole_batch, config.batch_groups)
    if config.gradient_accumulation_steps > 1:
        return functools.partial(accumulated, whole_batch, config.gradient_accumulation_steps)
    return whole_batch


def accumulated(gradient: Gradient, microbatches: int, params: Any, counts: Any, rows: Any) -> Any:
    """Gradient and metrics summed over microbatches, one after another."""
    _, metrics = jax.eval_shape(gradient, params, counts, rows)
    zeros = jax.tree.map(jnp.zeros_like, (params, jax.tree.map(lambda _: counts[0], metrics)))
    split = jax.tree.map(lambda x: split_microbatches(x, microbatches), rows)

    def add(total: Any, microbatch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, counts, microbatch)), None

    return jax.lax.scan(add, zeros, split)[0]


def deterministic(gradient: Gradient, groups: int, params: Any, counts: Any, rows: Any) -> Any:
    """Gradient and metrics summed over groups in a fixed order, with the same bits on any number of devices."""

    def of_group(shared: tuple[Any, Any], group: Any) -> Any:
        params, counts = shared
        return gradient(params, counts, group)

    return sum_groups(of_group, groups, (params, counts), rows)
