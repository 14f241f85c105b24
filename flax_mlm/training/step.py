"""The train step: masks a batch, takes the gradient of the loss, updates the parameters."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flax_mlm.checkpoint.fingerprint import fingerprint_scalar
from flax_mlm.config.phases import Phase, single_phase
from flax_mlm.config.schema import Config
from flax_mlm.distributed.mesh import bind_to_mesh, use_mesh
from flax_mlm.inference.forward import Batch, Forward, build_forward
from flax_mlm.model import flops, heads
from flax_mlm.objectives.masking import Rates, rates_at
from flax_mlm.objectives.rows import Vocabulary, row_keys, run_key
from flax_mlm.objectives.targets import Targets, make_targets, max_predictions_per_row
from flax_mlm.optim import optimizer
from flax_mlm.training.gradients import choose_gradient
from flax_mlm.training.state import Metrics, TrainState, new_state
from flax_mlm.training.update import StepContext, gradient_params, update


class Training(NamedTuple):
    """Functions of the train state for one phase of a run on one mesh. Call them under `use_mesh(mesh)`."""

    forward: Forward
    init: Callable[..., TrainState]  # (parameters; new ones if omitted) -> state before the first step; jitted
    abstract: TrainState  # shapes, dtypes and shardings of the state
    step: jax.stages.Wrapped  # (TrainState, Batch, Vocabulary) -> (TrainState, metrics by name); the state is donated
    flops: float  # model FLOPs of one step


def build_training(config: Config, vocab_size: int, mesh: Mesh, phase: Phase | None = None) -> Training:
    """Builds model, loss and optimizer, and jits the train step.

    Args:
      phase: part of a run that the step belongs to, with this config; None: the run has one phase.

    Raises:
      UserError: `model.attention` is a kernel that the mesh's devices do not have.
    """
    phase = phase or single_phase(config)
    forward = build_forward(config, vocab_size, mesh)
    tx = optimizer.make(config.optimizer, forward.model.dims)

    def init(params: Any = None) -> TrainState:
        params = params or forward.init()
        return new_state(params, tx.init(params), keeps_average=config.optimizer.averages != "none")

    with use_mesh(mesh):
        abstract = bind_to_mesh(jax.eval_shape(init), mesh)
    gradient = choose_gradient(config.train, forward.loss)
    context = StepContext(phase, forward.loss, gradient, tx, mesh.devices.flat[0].platform)
    step = jax.jit(functools.partial(_train_step, context), donate_argnums=0)
    return Training(forward, jax.jit(init), abstract, step, _flops(phase, vocab_size))


def _train_step(context: StepContext, state: TrainState, batch: Batch, vocab: Vocabulary) -> tuple[TrainState, Metrics]:
    phase, loss = context.phase, context.loss
    end = progress_after(phase, state, batch)
    fraction = fraction_done(phase, state)
    rates = rates_at(phase, fraction)
    targets, dropout_keys_B = model_inputs(phase, batch, vocab, rates)
    counts = loss.counts(targets)  # over the global batch, also where the gradient is computed in parts
    params = gradient_params(context, state)
    grads, means = context.gradient(params, counts, (targets, dropout_keys_B))
    state, update_metrics = update(context, state, grads, means["loss"], fraction, end)
    return state, {
        **means,
        **update_metrics,
        "mask_rate": jnp.float32(rates.mask),
        "predicted_tokens": counts[0],
        "tokens": (targets.segment_ids_BL > 0).sum(),
        "progress": end,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
        # The same on any number of devices and hosts, and after any restart.
        "batch_fingerprint": fingerprint_scalar((targets.inputs_BL, targets.predict_BK, targets.labels_BK)),
        "stop": batch["stop"].any(),
    }


def fraction_done(phase: Phase, state: TrainState) -> jax.Array:
    """Fraction of the phase done before the next step, float32 (); by steps it does not depend on the run's length."""
    if phase.num_steps is None:
        return jnp.clip((state.progress - phase.begin) / (phase.end - phase.begin), 0.0, 1.0)
    return jnp.float32(state.step - phase.first_step) / phase.num_steps


def progress_after(phase: Phase, state: TrainState, batch: Batch) -> jax.Array:
    """Fraction of the run done after the next step, float32 (). With a budget it follows the clock of the batch."""
    if phase.num_steps is None:
        return jnp.maximum(state.progress, batch["progress"].max())
    steps_done = (state.step - phase.first_step + 1).astype(jnp.float32)
    return phase.begin + (phase.end - phase.begin) * (steps_done / phase.num_steps)


def model_inputs(phase: Phase, batch: Batch, vocab: Vocabulary, rates: Rates) -> tuple[Targets, jax.Array | None]:
    """Inputs and targets of a training batch, and the rows' dropout keys (B,), None without dropout."""
    config = phase.config
    targets = make_targets(config.objective, batch, run_key(config, "mask"), vocab, rates, _slots(phase))
    if config.model.dropout_rate == config.model.attention_dropout_rate == 0.0:
        return targets, None
    return targets, row_keys(run_key(config, "dropout"), batch["row_ids"])


def _slots(phase: Phase) -> int:
    """K, prediction slots of a row."""
    return max_predictions_per_row(phase.config.objective, phase.config.data.seq_len, phase.largest_mask_rate)


def _flops(phase: Phase, vocab_size: int) -> float:
    """Model FLOPs of one step."""
    config, num_predictions = phase.config, _slots(phase)
    rows = heads.vocab_rows(config.model, vocab_size)
    if config.objective.name == "rtd":
        return config.train.global_batch_size * flops.per_row_of_rtd(config, num_predictions, rows)
    return config.train.global_batch_size * flops.per_row(config.model, config.data.seq_len, num_predictions, rows)
