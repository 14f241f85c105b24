"""The update of a step: clip the gradient, apply the optimizer unless the step is bad, update the average."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_mlm.config.phases import Phase
from flax_mlm.config.schema import Config, OptimizerConfig
from flax_mlm.distributed.deterministic import gather_whole
from flax_mlm.distributed.mesh import reshard_like
from flax_mlm.optim import averaging, optimizer, schedules, spikes
from flax_mlm.training.state import TrainState


class StepContext(NamedTuple):
    """Constants of a train step."""

    config: Config
    phase: Phase
    tx: optax.GradientTransformationExtraArgs
    platform: str

    def barrier(self, tree: Any) -> Any:
        """`tree`, behind a barrier to the compiler's fusions where the bits must be reproducible."""
        return jax.lax.optimization_barrier(tree) if self.config.train.reproducible else tree

    def whole(self, tree: Any) -> Any:
        """`tree`, gathered on every device where the bits must be reproducible."""
        return gather_whole(tree) if self.config.train.reproducible else tree


class Clip(NamedTuple):
    """Gradient clipping of one step."""

    scale: jax.Array  # float32, factor for the gradient
    values_2: jax.Array  # float32, loss and gradient norm, before clipping
    counted_2: jax.Array  # float32, the same as the spike statistics count them
    is_spike: jax.Array  # bool


def gradient_params(context: StepContext, state: TrainState) -> Any:
    """Parameters to take the gradient at: with schedule-free between the parameters and their average."""
    if context.config.optimizer.averages != "schedule_free":
        return state.params
    params, average = context.whole((state.params, state.average))
    return context.barrier(averaging.gradient_params(context.config.optimizer, params, average))


@jax.named_scope("optimizer")
def update(
    context: StepContext, state: TrainState, grads: Any, loss: jax.Array, fraction: Any, end: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """State after one step, and metrics of the update.

    Args:
      loss: float32 (), mean over the global batch.
      fraction: float32 (), fraction of the phase done before the step.
      end: float32 (), fraction of the run done after the step.
    """
    config, phase = context.config, context.phase
    grad_norm = optimizer.global_norm(grads)
    old, average = context.whole(((state.params, state.opt_state), state.average))
    grads = reshard_like(grads, old[0])
    clip = clip_gradient(config.optimizer, state.running, loss, grad_norm)
    peak = phase.value("optimizer.learning_rate", fraction)
    learning_rate = peak * schedules.learning_rate(config.optimizer, state.progress, end)
    weight_decay = phase.value("optimizer.weight_decay", fraction)
    is_good = jnp.isfinite(clip.values_2).all()
    if config.optimizer.spike_action == "skip":
        is_good &= ~clip.is_spike

    def optimize(params: Any, opt_state: Any) -> tuple[Any, Any]:
        clipped = jax.tree.map(lambda g: g * clip.scale, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            at = averaging.gradient_params(config.optimizer, params, average)
            updates, opt_state = context.tx.update(clipped, opt_state, at, weight_decay=weight_decay)
        return jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), opt_state

    new = context.barrier(apply_if(is_good, optimize, old, context.platform))
    new_average = averaging.update_average(config.optimizer, config.train.steps, state.step, average, new[0])
    shardings = (state.params, state.opt_state), state.average
    (params, opt_state), new_average = reshard_like(context.barrier((new, new_average)), shardings)
    bad = 1 - is_good.astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        progress=end,
        params=params,
        opt_state=opt_state,
        skipped=state.skipped + bad,
        skipped_in_a_row=(state.skipped_in_a_row + bad) * bad,
        running=spikes.update(state.running, clip.counted_2, config.optimizer.spike_threshold),
        average=new_average,
    )
    return state, {"learning_rate": learning_rate, "grad_norm": grad_norm, "spike": clip.is_spike}


def clip_gradient(config: OptimizerConfig, running: spikes.Running, loss: jax.Array, grad_norm: jax.Array) -> Clip:
    """Clips the gradient to `max_grad_norm` and, with `spike_action=clip`, to the norm that ZClip allows."""
    values_2 = jnp.stack([loss, grad_norm])
    is_spike = (spikes.z_scores(running, values_2) > config.spike_threshold).any()
    largest, counted_2 = jnp.float32(config.max_grad_norm or jnp.inf), values_2
    if config.spike_action == "clip":
        spike_limit = spikes.clip_norm(running, values_2, config.spike_threshold)
        largest, counted_2 = jnp.minimum(largest, spike_limit), counted_2.at[1].min(spike_limit)
    scale = jnp.where(grad_norm > largest, largest / grad_norm, 1.0)
    return Clip(scale, values_2, counted_2, is_spike)


def apply_if(condition: jax.Array, fn: Callable[..., Any], args: tuple[Any, ...], platform: str) -> Any:
    """`fn(*args)` if the condition holds, else `args`."""
    if platform == "cpu":  # perf(xla-cpu): a choice between the results would copy Adam's moments
        return jax.lax.cond(condition, fn, lambda *args: args, *args)
    # perf(xla-tpu): a conditional would move more memory than a choice between the results
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), fn(*args), args)
