"""The update of a step: clip the gradient, apply the optimizer unless the step is bad, update the average."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_mlm.config.phases import Phase
from flax_mlm.config.schema import OptimizerConfig
from flax_mlm.distributed.deterministic import gather_whole
from flax_mlm.distributed.mesh import reshard_like
from flax_mlm.objectives.losses import Loss
from flax_mlm.optim import averaging, optimizer, spikes
from flax_mlm.training.gradients import Gradient
from flax_mlm.training.state import Metrics, TrainState


class StepContext(NamedTuple):
    """Constants of a train step."""

    phase: Phase
    loss: Loss
    gradient: Gradient
    tx: optax.GradientTransformationExtraArgs
    platform: str

    def barrier(self, tree: Any) -> Any:
        """`tree`, behind a barrier to the compiler's fusions where the bits must be reproducible."""
        return jax.lax.optimization_barrier(tree) if self.phase.config.train.reproducible else tree

    def whole(self, tree: Any) -> Any:
        """`tree`, gathered on every device where the bits must be reproducible."""
        return gather_whole(tree) if self.phase.config.train.reproducible else tree


def gradient_params(context: StepContext, state: TrainState) -> Any:
    """Parameters at which the gradient is taken: with schedule-free between the parameters and their average."""
    config = context.phase.config.optimizer
    if config.averages != "schedule_free":
        return state.params
    return context.barrier(averaging.gradient_params(config, *context.whole((state.params, state.average))))


@jax.named_scope("optimizer")
def update(
    context: StepContext, state: TrainState, grads: Any, loss: jax.Array, fraction: Any, end: Any
) -> tuple[TrainState, Metrics]:
    """State after one step, and metrics of the update.

    Args:
      loss: float32 (), mean over the global batch.
      fraction: float32 (), fraction of the phase done before the step.
      end: float32 (), fraction of the run done after the step.
    """
    phase, config = context.phase, context.phase.config.optimizer
    grad_norm = optimizer.global_norm(grads)
    old, average = context.whole(((state.params, state.opt_state), state.average))
    grads = reshard_like(grads, old[0])
    values_2 = jnp.stack([loss, grad_norm])
    is_spike = (spikes.z_scores(state.running, values_2) > config.spike_threshold).any()
    largest_norm, counted_2 = clip_norm(config, state.running, values_2)
    scale = jnp.where(grad_norm > largest_norm, largest_norm / grad_norm, 1.0)
    peak = phase.value("optimizer.learning_rate", fraction)
    learning_rate = peak * schedule(phase, state.step, state.progress, end)
    weight_decay = phase.value("optimizer.weight_decay", fraction)
    is_good = jnp.isfinite(values_2).all()
    if config.spike_action == "skip":
        is_good &= ~is_spike

    def optimize(params: Any, opt_state: Any) -> tuple[Any, Any]:
        clipped = jax.tree.map(lambda g: g * scale, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            at = averaging.gradient_params(config, params, average)
            updates, opt_state = context.tx.update(clipped, opt_state, at, weight_decay=weight_decay)
        return jax.tree_util.tree_map_with_path(apply, params, updates), opt_state

    def apply(path: Any, p: jax.Array, update: jax.Array) -> jax.Array:
        """Takes a step along an update, with the learning rate of the encoder or of the vocabulary head."""
        rate = learning_rate
        if path[0].key == "head":
            rate = rate * config.head_rate_factor
        elif config.head_first_steps:
            rate = jnp.where(state.step >= config.head_first_steps, rate, 0.0)
        return p - rate * update

    new = context.barrier(apply_if(is_good, optimize, old, context.platform))
    average = averaging.update_average(config, phase.config.train.steps, state.step, average, new[0])
    shardings = (state.params, state.opt_state), state.average
    (params, opt_state), average = reshard_like(context.barrier((new, average)), shardings)
    bad = 1 - is_good.astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        progress=end,
        params=params,
        opt_state=opt_state,
        skipped=state.skipped + bad,
        skipped_in_a_row=(state.skipped_in_a_row + bad) * bad,
        running=spikes.update(state.running, counted_2, config.spike_threshold),
        average=average,
    )
    return state, {"learning_rate": learning_rate, "grad_norm": grad_norm, "spike": is_spike}


def schedule(phase: Phase, step: Any, progress: Any, end: Any) -> jax.Array:
    """Learning rate of a step of a phase, for a peak of 1.

    Args:
      step: int32, its number, from 0.
      progress: float32, fraction of the run done before it.
      end: float32, fraction done after it. Both count only where time ends the run. Elsewhere the number of the step
        decides, so that a run that was made longer has the rates of one that was as long from the start.
    """
    first, last, first_step, num_steps = phase.cycle
    if phase.num_steps is None:
        begin, end = ((x - first) / (last - first) for x in (progress, end))
    else:
        a, b = ((x - first) / (last - first) for x in (phase.begin, phase.end))
        done = jnp.float32(step - phase.first_step)
        begin, end = (a + (b - a) * (x / phase.num_steps) for x in (done, done + 1.0))
    return optimizer.learning_rate(phase.config.optimizer, begin, end, step - first_step, num_steps)


def clip_norm(config: OptimizerConfig, running: spikes.Running, values_2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest norm of a gradient, by `max_grad_norm` and, with `spike_action=clip`, by ZClip; and loss and gradient
    norm as the spike statistics count them."""
    largest = jnp.float32(config.max_grad_norm or jnp.inf)
    if config.spike_action != "clip":
        return largest, values_2
    limit = spikes.clip_norm(running, values_2, config.spike_threshold)
    return jnp.minimum(largest, limit), values_2.at[1].min(limit)


def apply_if(condition: jax.Array, fn: Callable[..., Any], args: tuple[Any, ...], platform: str) -> Any:
    """`fn(*args)` if the condition holds, else `args`."""
    if platform == "cpu":  # perf(xla-cpu): a choice between the results would copy Adam's moments
        return jax.lax.cond(condition, fn, lambda *args: args, *args)
    # perf(xla-tpu): a conditional would move more memory than a choice between the results
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), fn(*args), args)
