"""Model, loss and inference functions of one config on one mesh, shared by training, evaluation and inference."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mlm.config.schema import Config
from flax_mlm.distributed.deterministic import map_groups
from flax_mlm.distributed.mesh import (
    bind_to_mesh,
    num_batch_shards,
    per_row,
    replicate,
    reshard_like,
    shard_params,
    use_mesh,
)
from flax_mlm.errors import UserError
from flax_mlm.model import electra, encoder, heads
from flax_mlm.model.attention.dispatch import resolve_attention
from flax_mlm.objectives import masking, rows, targets
from flax_mlm.objectives.losses import Loss, language_modelling, log_probabilities, replaced_token_detection
from flax_mlm.objectives.rows import Vocabulary

# tokens int32 (B, L); row_ids uint32 (B, 2); stop bool (B,); in a run with a budget also progress float32 (B,), the
# fraction of the run at the end of the step by each process's clock
Batch = dict[str, jax.Array]


class NotFinite(UserError):
    """A model computes NaN or infinity, with which nothing can be compared, ranked or averaged."""


def check_finite(outputs: Any) -> None:
    """Checks what a model computed, arrays or a tree of arrays, where it leaves the devices.

    Raises:
      NotFinite: a number is NaN or infinite.
    """
    if not all(np.isfinite(array).all() for array in jax.tree.leaves(outputs)):
        what = "the model computes NaN or infinity; expected finite numbers; its weights hold some, or overflow"
        raise NotFinite(f"{what}; use another checkpoint, or train it with a lower learning rate")


class EvalOutput(NamedTuple):
    """Losses of a batch's predicted tokens, whole on every device; K prediction slots a row."""

    scored: Any  # TokenLosses; with rtd DetectionLosses
    weights_BK: jax.Array  # float32, 1 for a prediction slot in use
    labels_BK: jax.Array  # int32
    positions_BK: jax.Array  # int32, position of the predicted token in its segment


class Forward(NamedTuple):
    """Functions of the parameters, jitted except for those in `model` and `loss`. Call them under
    `use_mesh(mesh)`."""

    model: heads.Model
    loss: Loss
    init: Callable[[], Any]  # () -> new parameters
    abstract_params: Any  # shapes, dtypes and shardings of the parameters
    evaluate: Callable[[Any, Batch, Vocabulary], tuple[EvalOutput, jax.Array]]  # and whether to stop, bool ()
    # (parameters, tokens (B, L), Vocabulary) -> hidden states (B, L, D), logits (B, L, V); with rtd logits (B, L)
    outputs: Callable[[Any, jax.Array, Vocabulary], tuple[jax.Array, jax.Array]]
    log_probs: Callable[..., jax.Array]  # see `_log_probs`


def build_forward(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> Forward:
    """Builds the model and its loss, without parameters, and jits the functions of inference.

    Raises:
      UserError: `model.attention` is a kernel that the mesh's devices do not have.
    """
    config = _for_devices(config, mesh)
    if config.objective.name == "rtd":
        generator, model = electra.networks(config, vocab_size)
        loss = replaced_token_detection(generator, model, vocab_size, config.objective)
    else:
        model = heads.language_model(config.model, vocab_size)
        loss = language_modelling(model, config.objective, config.train.logits_chunks)

    def init() -> Any:
        return shard_params(model.init(rows.run_key(config, "init")), model.dims)

    with use_mesh(mesh):
        abstract_params = bind_to_mesh(jax.eval_shape(init), mesh)
    return Forward(
        model,
        loss,
        jax.jit(init),
        abstract_params,
        evaluate=jax.jit(functools.partial(_evaluate, config, loss)),
        outputs=jax.jit(functools.partial(_outputs, config, model)),
        log_probs=jax.jit(functools.partial(_log_probs, config, model)),
    )


def _for_devices(config: Config, mesh: jax.sharding.Mesh) -> Config:
    """The config with its choices that depend on the devices made: attention kernel, and whether layers are scanned."""
    platform = mesh.devices.flat[0].platform
    # Unrolled layers are simplified differently by XLA on one device than on several, and so rounded differently.
    scans = config.train.reproducible or encoder.resolve_scan_layers(config.model, platform, config.mesh.fsdp)
    model = dataclasses.replace(config.model, attention=resolve_attention(config, platform), scan_layers=scans)
    return dataclasses.replace(config, model=model)


def _evaluate(config: Config, loss: Loss, params: Any, batch: Batch, vocab: Vocabulary) -> tuple[EvalOutput, jax.Array]:
    o, seq_len, groups = config.objective, config.data.seq_len, config.train.batch_groups
    rates = masking.rates(o, config.eval.mask_rate)
    num_predictions = targets.max_predictions_per_row(o, seq_len, config.eval.mask_rate)
    made = targets.make_targets(o, batch, rows.run_key(config, "eval"), vocab, rates, num_predictions)
    # On more devices than there are groups the losses can only be the same up to rounding.
    if config.train.reproducible and groups % num_batch_shards(jax.sharding.get_abstract_mesh()) == 0:
        losses = map_groups(lambda params, group: loss.predict(params, group, None), groups, params, made)
    else:
        losses = loss.predict(params, made, None)
    offset = int(o.name == "clm")  # a causal model predicts the token after its position
    positions_BK = per_row(lambda t: jnp.take_along_axis(t.positions_BL, t.predict_BK, axis=1) + offset, made)
    return replicate(EvalOutput(losses, made.weights_BK, made.labels_BK, positions_BK)), batch["stop"].any()


def _encode(config: Config, model: heads.Model, params: Any, tokens_BL: jax.Array, vocab: Vocabulary) -> jax.Array:
    """Hidden states (B, L, D); the tokens are used as they are, nothing more is masked."""
    segment_ids_BL, positions_BL = per_row(
        lambda tokens, vocab: (s := rows.segment_ids(tokens, vocab), rows.positions(s)), tokens_BL, vocab
    )
    return model.encode(params, tokens_BL, segment_ids_BL, positions_BL, causal=config.objective.name == "clm")


def _outputs(
    config: Config, model: heads.Model, params: Any, tokens_BL: jax.Array, vocab: Vocabulary
) -> tuple[jax.Array, jax.Array]:
    hidden_BLD = _encode(config, model, params, tokens_BL, vocab)
    logits = model.logits(params, hidden_BLD)
    predict_BL = reshard_like(jax.lax.broadcasted_iota(jnp.int32, tokens_BL.shape, 1), tokens_BL)
    return hidden_BLD, logits if config.objective.name == "rtd" else logits(predict_BL)


def _log_probs(
    config: Config, model: heads.Model, params: Any, tokens_BL: Any, predict_BK: Any, labels_BK: Any, vocab: Vocabulary
) -> jax.Array:
    """Log-probabilities of `labels_BK` (B, K), or of all tokens (B, K, V) for None, at positions `predict_BK`.

    Raises:
      UserError: the objective is rtd, whose encoder has no vocabulary head.
    """
    if config.objective.name == "rtd":
        what = "this encoder predicts which tokens were replaced and has no logits over the vocabulary"
        raise UserError(f"objective.name is rtd; {what}; use a model trained with mlm or clm")
    logits_BKV = model.logits(params, _encode(config, model, params, tokens_BL, vocab))(predict_BK)
    if labels_BK is None:
        return replicate(jax.nn.log_softmax(logits_BKV, axis=-1))
    return replicate(log_probabilities(logits_BKV, labels_BK))
