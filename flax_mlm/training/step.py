"""The train state and the jitted steps. All that is jitted elsewhere: finetune.py, hf/check.py, a test of cuDNN."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flax_mlm.checkpoint.fingerprint import fingerprint_scalar, fingerprint_tree
from flax_mlm.config import phases
from flax_mlm.config.phases import Phase
from flax_mlm.config.schema import Config
from flax_mlm.distributed.batches import split_microbatches
from flax_mlm.distributed.deterministic import map_groups, sum_groups
from flax_mlm.distributed.mesh import bind_to_mesh, num_batch_shards, param_spec, per_row, replicate, reshard_like
from flax_mlm.errors import UserError
from flax_mlm.model import electra, encoder, flops
from flax_mlm.model.attention.dispatch import resolve_attention
from flax_mlm.model.heads import Model, language_model, vocab_rows
from flax_mlm.objectives import masking, segments
from flax_mlm.objectives.keys import row_keys, run_key
from flax_mlm.objectives.language_modelling import Loss, language_modelling, log_probabilities
from flax_mlm.objectives.masking import rates_at
from flax_mlm.objectives.replaced_token_detection import replaced_token_detection
from flax_mlm.objectives.targets import Targets, make_targets, max_predictions_per_row
from flax_mlm.objectives.vocabulary import Vocabulary
from flax_mlm.optim import averaging, optimizer, schedules, spikes

# tokens int32 (B, L); row_ids uint32 (B, 2); stop bool (B,); of a run with a budget also progress float32 (B,), the
# largest of which is the share of it that the step ends at
Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything a run needs to go on; nothing random is kept, since keys follow from the seed and the rows."""

    step: jax.Array  # int32, updates tried so far
    progress: jax.Array  # float32, the share of the run that they are
    params: Any
    opt_state: Any
    skipped: jax.Array  # int32, updates left out because the loss or a gradient was not finite, or a spike
    skipped_in_a_row: jax.Array  # int32
    running: spikes.Running
    average: Any  # of the params, and like them; None where none is kept

    @property
    def weights(self) -> Any:
        """What is evaluated."""
        return self.params if self.average is None else self.average


class EvalOutput(NamedTuple):
    """What the model says of a batch's predicted tokens, whole on every device; K slots a row."""

    scored: Any  # TokenLosses; with rtd DetectionLosses
    weights_BK: jax.Array  # float32, 1 for a slot in use
    labels_BK: jax.Array  # int32
    positions_BK: jax.Array  # int32, of the predicted token in its segment


class Steps(NamedTuple):
    """The jitted functions of one config on one mesh. Call them under `jax.set_mesh(mesh)`."""

    model: Model
    flops: float  # model FLOPs of one training step
    init: Callable[..., TrainState]  # with new parameters, or with those given
    abstract: TrainState  # shapes, dtypes and shardings of the state
    loss: Loss  # not jitted
    train: jax.stages.Wrapped  # (TrainState, Batch, Vocabulary) -> (TrainState, scalars by name); the state is donated
    evaluate: Callable[[Any, Batch, Vocabulary], tuple["EvalOutput", jax.Array]]  # and whether to stop
    fingerprint: Callable[[Any], dict[str, jax.Array]]  # of any tree of arrays, see fingerprint_tree
    score: Callable[[Any, jax.Array, jax.Array, Vocabulary], jax.Array]  # of every piece, see `_score`
    score_labels: Callable[[Any, jax.Array, jax.Array, jax.Array, Vocabulary], jax.Array]


def make_steps(config: Config, vocab_size: int, mesh: Mesh, phase: Phase | None = None) -> Steps:
    """Builds model and optimizer and jits what runs on the devices.

    Args:
      phase: The part of a run that `train` is for, of this config; None: it is the whole run.

    Raises:
      UserError: `model.attention` is a kernel that these devices do not have.
    """
    phase = phase or phases.single_phase(config)
    if config.train.reproducible:
        # Unrolled, XLA simplifies the layers otherwise on one device than on several, and rounds so.
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=True))
    platform = mesh.devices.flat[0].platform
    model_config = dataclasses.replace(
        config.model,
        attention=resolve_attention(config, platform),
        scan_layers=encoder.scans_layers(config.model, platform, config.mesh.fsdp),
    )
    config = dataclasses.replace(config, model=model_config)
    rows = vocab_rows(config.model, vocab_size)
    slots = max_predictions_per_row(config.objective, config.data.seq_len, phase.largest_mask_rate)
    if config.objective.name == "rtd":
        generator, model = electra.networks(config, vocab_size)
        loss = replaced_token_detection(generator, model, vocab_size, config.objective)
        per_row = flops.per_row_of_rtd(config, slots, rows)
    else:
        model = language_model(config.model, vocab_size)
        loss = language_modelling(model, config.objective, config.train.logits_chunks)
        per_row = flops.per_row(config.model, config.data.seq_len, slots, rows)
    tx = optimizer.make(config.optimizer, model.dims)

    def init(params: Any = None) -> TrainState:
        params = params or model.init(run_key(config, "init"))
        params = jax.tree.map(lambda x, d: jax.reshard(x, param_spec(d, x.ndim)), params, model.dims)
        average = jax.tree.map(jnp.copy, params) if config.optimizer.averages != "none" else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, jnp.float32(0.0), params, tx.init(params), zero, zero, spikes.init(), average)

    with jax.set_mesh(mesh):
        abstract = bind_to_mesh(jax.eval_shape(init), mesh)
    return Steps(
        model,
        flops=config.train.global_batch_size * per_row,
        init=jax.jit(init),
        abstract=abstract,
        loss=loss,
        train=jax.jit(_train_step(config, phase, loss, tx, slots, platform), donate_argnums=0),
        evaluate=jax.jit(_eval_step(config, loss)),
        fingerprint=jax.jit(fingerprint_tree),
        score=jax.jit(_score(config, model)),
        score_labels=jax.jit(_score_labels(config, model)),
    )


def inputs(
    config: Config, batch: Batch, vocab: Vocabulary, rates: masking.Rates, slots: int
) -> tuple[Targets, jax.Array | None]:
    """What a batch is in training: inputs and targets, and each row's key for dropout, if there is any."""
    targets = make_targets(config.objective, batch, run_key(config, "mask"), vocab, rates, slots)
    if config.model.dropout_rate == config.model.attention_dropout_rate == 0.0:
        return targets, None
    return targets, row_keys(run_key(config, "dropout"), batch["row_ids"])


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=0)
def at_phase(state: TrainState, trained: int, wanted: int) -> TrainState:
    """The state to begin a further phase with: what its losses and gradients will be like is not known yet, and of the
    `wanted` learned positions those after the `trained` ones begin as the first again (Longformer, arXiv:2004.05150,
    section 5). Of rotary positions there is nothing to do."""

    def extend(path: Any, x: jax.Array) -> jax.Array:
        if path[-1].key != "position" or wanted <= trained:
            return x
        copies = jnp.concatenate([x[:trained]] * -(-wanted // trained))
        return jnp.concatenate([copies[:wanted], x[wanted:]])

    params, average = (jax.tree_util.tree_map_with_path(extend, tree) for tree in (state.params, state.average))
    return state._replace(params=params, average=average, running=spikes.init())


def _train_step(
    config: Config, phase: Phase, objective_loss: Loss, tx: Any, slots: int, platform: str
) -> Callable[..., Any]:
    accumulate = config.train.gradient_accumulation_steps
    action, spike_threshold = config.optimizer.spike_action, config.optimizer.spike_threshold
    barrier = jax.lax.optimization_barrier if config.train.reproducible else lambda tree: tree

    def whole(tree: Any) -> Any:
        """Where it must be the same bit for bit, whole on every device, since even elementwise code may round
        differently at another shape; and with barriers, lest the compiler move the cut into shards before the
        arithmetic."""
        return barrier(replicate(tree)) if config.train.reproducible else tree

    def gradients(at: Any, counts: Any, parts: Any) -> tuple[dict[str, jax.Array], Any]:
        """The means over the global batch, of which `counts` are the numbers, and the gradient of the loss at some
        parameters."""

        def part_loss(params: Any, counts: Any, part: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            return objective_loss.total(objective_loss.predict(params, *part), counts)

        gradient = jax.value_and_grad(part_loss, has_aux=True)
        if config.train.reproducible:
            groups = config.train.batch_groups
            (_, means), grads = sum_groups(lambda shared, part: gradient(*shared, part), groups, (at, counts), parts)
        elif accumulate == 1:
            (_, means), grads = gradient(at, counts, parts)
        else:
            values, _ = jax.eval_shape(gradient, at, counts, parts)
            zeros = jax.tree.map(jnp.zeros_like, (jax.tree.map(lambda _: counts[0], values), at))
            parts = jax.tree.map(lambda x: split_microbatches(x, accumulate), parts)

            def add(total: Any, part: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, gradient(at, counts, part)), None

            ((_, means), grads), _ = jax.lax.scan(add, zeros, parts)
        return means, grads

    @jax.named_scope("optimizer")
    def updated(
        state: TrainState, grads: Any, loss: jax.Array, share: Any, begin: Any, end: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state after the step, and what became of the gradient."""
        grad_norm = optimizer.global_norm(grads)
        old, average = whole(((state.params, state.opt_state), state.average))
        grads = reshard_like(grads, old[0])
        values_2 = jnp.stack([loss, grad_norm])
        spike = (spikes.z_scores(state.running, values_2) > spike_threshold).any()
        largest, counted_2 = jnp.float32(config.optimizer.max_grad_norm or jnp.inf), values_2
        if action == "clip":
            cut = spikes.clip_norm(state.running, values_2, spike_threshold)
            largest, counted_2 = jnp.minimum(largest, cut), counted_2.at[1].min(cut)
        scale = jnp.where(grad_norm > largest, largest / grad_norm, 1.0)
        lr = phase.value("optimizer.learning_rate", share) * schedules.learning_rate(config.optimizer, begin, end)
        weight_decay = phase.value("optimizer.weight_decay", share)
        good = jnp.isfinite(values_2).all()
        if action == "skip":
            good &= ~spike

        def update(params: Any, opt_state: Any) -> tuple[Any, Any]:
            clipped = jax.tree.map(lambda g: g * scale, grads)
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
                at = averaging.gradient_params(config.optimizer, params, average)
                updates, opt_state = tx.update(clipped, opt_state, at, weight_decay=weight_decay)
            return jax.tree.map(lambda p, u: p - lr * u, params, updates), opt_state

        if platform == "cpu":  # a choice of the results would copy the moments: 4% of a step of 12 layers of 768
            new = jax.lax.cond(good, update, lambda *old: old, *old)
        else:  # and here a choice beforehand would move more: 5% of a step of BERT-base on v5e, by its compiler
            new = jax.tree.map(lambda n, o: jnp.where(good, n, o), update(*old), old)
        new = barrier(new)
        average = averaging.update_average(config.optimizer, config.train.steps, state.step, average, new[0])
        held = (state.params, state.opt_state), state.average
        (params, opt_state), average = reshard_like(barrier((new, average)), held)
        bad = 1 - good.astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            progress=end,
            params=params,
            opt_state=opt_state,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + bad) * bad,
            running=spikes.update(state.running, counted_2, spike_threshold),
            average=average,
        )
        return state, {"learning_rate": lr, "grad_norm": grad_norm, "spike": spike}

    def train_step(state: TrainState, batch: Batch, vocab: Vocabulary) -> tuple[TrainState, dict[str, Any]]:
        begin = state.progress
        if phase.num_steps is None:
            end = jnp.maximum(begin, batch["progress"].max())
        else:
            done = (state.step - phase.first_step + 1).astype(jnp.float32) / phase.num_steps
            end = phase.begin + (phase.end - phase.begin) * done
        share = jnp.clip((begin - phase.begin) / (phase.end - phase.begin), 0.0, 1.0)  # of the phase
        rates = rates_at(phase, share)
        targets, dropout_keys_B = inputs(config, batch, vocab, rates, slots)
        counts = objective_loss.counts(targets)  # over the whole global batch
        at = state.params
        if config.optimizer.averages == "schedule_free":
            at = barrier(averaging.gradient_params(config.optimizer, *whole((state.params, state.average))))
        means, grads = gradients(at, counts, (targets, dropout_keys_B))
        state, update = updated(state, grads, means["loss"], share, begin, end)
        metrics = {
            **means,
            **update,
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
        return state, metrics

    return train_step


def _eval_step(config: Config, loss: Loss) -> Callable[..., tuple[EvalOutput, jax.Array]]:
    slots = max_predictions_per_row(config.objective, config.data.seq_len, config.eval.mask_rate)
    ahead = int(config.objective.name == "clm")  # a causal model stands before what it predicts

    def eval_step(params: Any, batch: Batch, vocab: Vocabulary) -> tuple[EvalOutput, jax.Array]:
        o, key = config.objective, run_key(config, "eval")
        targets = make_targets(o, batch, key, vocab, masking.rates(o, config.eval.mask_rate), slots)
        # Where it cannot be the same bit for bit, on more devices than there are groups, it is the same up to rounding.
        parts = num_batch_shards(jax.sharding.get_abstract_mesh())
        if config.train.reproducible and config.train.batch_groups % parts == 0:
            groups = config.train.batch_groups
            scored = map_groups(lambda params, part: loss.predict(params, part, None), groups, params, targets)
        else:
            scored = loss.predict(params, targets, None)
        positions_BK = per_row(lambda t: jnp.take_along_axis(t.positions_BL, t.predict_BK, axis=1) + ahead, targets)
        answers = EvalOutput(scored, targets.weights_BK, targets.labels_BK, positions_BK)
        return replicate(answers), batch["stop"].any()

    return eval_step


def _scores(config: Config, model: Model) -> Callable[..., jax.Array]:
    causal = config.objective.name == "clm"

    def scores(params: Any, tokens_BL: jax.Array, predict_BK: jax.Array, vocab: Vocabulary) -> jax.Array:
        """Scores (B, K, V) at chosen positions; nothing is masked that is not masked already.

        Raises:
          UserError: the model has none.
        """
        if config.objective.name == "rtd":
            raise UserError(
                "this encoder was trained with objective rtd: it says which tokens were replaced, and not which word "
                "belongs where; that takes mlm or clm"
            )
        segments_BL, positions_BL = per_row(
            lambda tokens, vocab: (s := segments.segment_ids(tokens, vocab), segments.positions(s)), tokens_BL, vocab
        )
        return model.apply(params, tokens_BL, segments_BL, positions_BL, predict_BK=predict_BK, causal=causal)

    return scores


def _score(config: Config, model: Model) -> Callable[..., jax.Array]:
    scores = _scores(config, model)

    def score(params: Any, tokens_BL: jax.Array, predict_BK: jax.Array, vocab: Vocabulary) -> jax.Array:
        """Log-probabilities (B, K, V) of every piece at chosen positions."""
        return replicate(jax.nn.log_softmax(scores(params, tokens_BL, predict_BK, vocab), axis=-1))

    return score


def _score_labels(config: Config, model: Model) -> Callable[..., jax.Array]:
    scores = _scores(config, model)

    def score_labels(
        params: Any, tokens_BL: jax.Array, predict_BK: jax.Array, labels_BK: jax.Array, vocab: Vocabulary
    ) -> jax.Array:
        """Log-probabilities (B, K) of one piece each at chosen positions."""
        return replicate(log_probabilities(scores(params, tokens_BL, predict_BK, vocab), labels_BK))

    return score_labels
