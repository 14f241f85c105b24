"""The train state and the jitted steps. The only file that calls jax.jit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flax_mlm import masking, objective, optimizer, sharding
from flax_mlm.config import Config
from flax_mlm.metrics import flops_per_row
from flax_mlm.model.heads import Model, language_model, vocab_rows

Batch = dict[str, jax.Array]  # tokens int32 (B, L); row_ids uint32 (B, 2)


class TrainState(NamedTuple):
    """Everything a run needs to go on; nothing random is kept, since keys follow from the step and the rows."""

    step: jax.Array  # int32, updates tried so far
    params: Any
    opt_state: Any
    skipped: jax.Array  # int32, updates skipped because the loss or a gradient was not finite
    skipped_in_a_row: jax.Array  # int32


class Steps(NamedTuple):
    """The jitted functions of one config on one mesh. Call them under `jax.set_mesh(mesh)`."""

    model: Model
    flops: float  # model FLOPs of one training step
    init: Callable[[], TrainState]
    abstract: TrainState  # shapes, dtypes and shardings of the state
    train: jax.stages.Wrapped  # (TrainState, Batch, Vocabulary) -> (TrainState, scalars by name); the state is donated
    evaluate: Callable[[Any, Batch, masking.Vocabulary], objective.Sums]  # of each row, on every process
    score: Callable[[Any, jax.Array, jax.Array, masking.Vocabulary], jax.Array]


def make_steps(config: Config, vocab_size: int, mesh: Mesh) -> Steps:
    """Builds model and optimizer and jits what runs on the devices."""
    model = language_model(config.model, vocab_size)
    tx = optimizer.make(config.optimizer, model.dims)
    slots = objective.num_slots(config.objective, config.data.seq_len, config.objective.largest_mask_rate)

    def init() -> TrainState:
        params = model.init(run_key(config, "init"))
        params = jax.tree.map(lambda x, d: jax.reshard(x, sharding.param_spec(d, x.ndim)), params, model.dims)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, tx.init(params), zero, zero)

    with jax.set_mesh(mesh):
        abstract = sharding.concrete(jax.eval_shape(init), mesh)
    return Steps(
        model,
        flops=config.train.global_batch_size
        * flops_per_row(config.model, config.data.seq_len, slots, vocab_rows(config.model, vocab_size)),
        init=jax.jit(init),
        abstract=abstract,
        train=jax.jit(_train_step(config, model, tx, slots), donate_argnums=0),
        evaluate=jax.jit(_eval_step(config, model)),
        score=jax.jit(_score(config, model)),
    )


def run_key(config: Config, purpose: str) -> jax.Array:
    """The run's key for one purpose."""
    return jax.random.fold_in(jax.random.key(config.seed), ("init", "mask", "dropout", "eval").index(purpose))


def _predict(config: Config, model: Model) -> Callable[..., objective.Sums]:
    """(parameters, targets, dropout keys) -> sums for each row."""

    def predict(params: Any, t: objective.Targets, dropout_keys_B: Any) -> objective.Sums:
        scores_BKV = model.apply(
            params,
            t.inputs_BL,
            t.segment_ids_BL,
            t.positions_BL,
            predict_BK=t.predict_BK,
            causal=config.objective.name == "clm",
            dropout_keys_B=dropout_keys_B,
        )
        with jax.named_scope("loss"):
            return objective.row_sums(scores_BKV, t.labels_BK, t.weights_BK)

    return predict


def _train_step(config: Config, model: Model, tx: optax.GradientTransformation, slots: int) -> Callable[..., Any]:
    total, accumulate = config.train.steps, config.train.microbatches
    schedule = optimizer.learning_rate(config.optimizer, total)
    predict = _predict(config, model)
    has_dropout = config.model.dropout_rate > 0.0 or config.model.attention_dropout_rate > 0.0

    def train_step(state: TrainState, batch: Batch, vocab: masking.Vocabulary) -> tuple[TrainState, dict[str, Any]]:
        rate = masking.mask_rate_at(config.objective, state.step, total)
        targets = objective.targets(config.objective, batch, run_key(config, "mask"), vocab, rate, slots)
        count = jnp.maximum(targets.weights_BK.sum(), 1.0)  # over the whole global batch; 1 where nothing is predicted
        dropout_keys_B = None
        if has_dropout:
            dropout_keys_B = jax.vmap(masking.row_key, (None, 0))(run_key(config, "dropout"), batch["row_ids"])

        def part_loss(params: Any, part: Any) -> tuple[jax.Array, jax.Array]:
            sums = predict(params, *part)
            return sums.loss.sum() / count, sums.correct.sum() / count

        gradient = jax.value_and_grad(part_loss, has_aux=True)
        parts = (targets, dropout_keys_B)
        if accumulate == 1:
            (loss, accuracy), grads = gradient(state.params, parts)
        else:
            zeros = jax.tree.map(jnp.zeros_like, ((count, count), state.params))
            parts = jax.tree.map(lambda x: sharding.split_microbatches(x, accumulate), parts)
            ((loss, accuracy), grads), _ = jax.lax.scan(
                lambda carry, part: (jax.tree.map(jnp.add, carry, gradient(state.params, part)), None), zeros, parts
            )

        with jax.named_scope("optimizer"):
            grad_norm = optimizer.global_norm(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
                updates, opt_state = tx.update(grads, state.opt_state, state.params)
            lr = schedule(state.step.astype(jnp.float32))
            params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
            )
        bad = 1 - finite.astype(jnp.int32)
        state = TrainState(state.step + 1, params, opt_state, state.skipped + bad, (state.skipped_in_a_row + bad) * bad)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": lr,
            "grad_norm": grad_norm,
            "mask_rate": rate,
            "predicted_tokens": count,
            "tokens": (targets.segment_ids_BL > 0).sum(),
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        return state, metrics

    return train_step


def _eval_step(config: Config, model: Model) -> Callable[..., objective.Sums]:
    slots = objective.num_slots(config.objective, config.data.seq_len, config.eval.mask_rate)
    predict = _predict(config, model)

    def eval_step(params: Any, batch: Batch, vocab: masking.Vocabulary) -> objective.Sums:
        key, rate = run_key(config, "eval"), config.eval.mask_rate
        targets = objective.targets(config.objective, batch, key, vocab, rate, slots)
        return sharding.replicate(predict(params, targets, None))

    return eval_step


def _score(config: Config, model: Model) -> Callable[..., jax.Array]:
    causal = config.objective.name == "clm"

    def score(params: Any, tokens_BL: jax.Array, predict_BK: jax.Array, vocab: masking.Vocabulary) -> jax.Array:
        """Log-probabilities (B, K, V) of tokens at chosen positions; nothing is masked that is not masked already."""
        segments_BL, positions_BL = sharding.per_row(
            lambda tokens, vocab: (s := masking.segment_ids(tokens, vocab), masking.positions(s)), tokens_BL, vocab
        )
        scores = model.apply(params, tokens_BL, segments_BL, positions_BL, predict_BK=predict_BK, causal=causal)
        return sharding.replicate(jax.nn.log_softmax(scores, axis=-1))

    return score
