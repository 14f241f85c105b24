"""Cross-entropy losses of `mlm` and `clm`, as sums and counts.

Sums are divided once, by the count over the whole global batch, so that the loss and its gradient are the same on one
device, on many, and with gradient accumulation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mlm.config.schema import ObjectiveConfig
from flax_mlm.model.elementwise import max_last_axis
from flax_mlm.model.heads import Model
from flax_mlm.objectives.targets import Targets


class TokenLosses(NamedTuple):
    """Per-token loss and accuracy, float32 (B, K); 0 in prediction slots not in use."""

    loss_BK: jax.Array  # cross-entropy in nats
    squared_log_z_BK: jax.Array  # (log Z)², Z the sum of exp(logit) over the vocabulary
    correct_BK: jax.Array  # 1 where no token has a larger logit than the label

    def means(self, count: jax.Array, z_loss: float) -> dict[str, jax.Array]:
        """Means over `count` predictions: loss, accuracy and, where its coefficient `z_loss` is not 0, z_loss."""
        sums = {"loss": self.loss_BK, "accuracy": self.correct_BK}
        if z_loss:
            sums["z_loss"] = z_loss * self.squared_log_z_BK
        return {name: x.sum(-1).sum() / count for name, x in sums.items()}


class Loss(NamedTuple):
    """A loss whose values over parts of the batch add up to its value over the whole batch."""

    predict: Callable[..., Any]  # (parameters, Targets, dropout keys (B,) or None) -> arrays with the rows first
    counts: Callable[[Targets], tuple[jax.Array, ...]]  # denominators of the whole batch; first, its predictions
    total: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]  # (predictions, counts) -> training loss, metrics


def language_modelling(model: Model, config: ObjectiveConfig, logits_chunks: int = 1) -> Loss:
    """Mean cross-entropy of the predictions + `config.z_loss` × their mean (log Z)².

    Args:
      logits_chunks: number of chunks in which logits are computed, to save memory.
    """

    def predict(params: Any, t: Targets, dropout_keys_B: Any) -> TokenLosses:
        context = t.segment_ids_BL, t.positions_BL
        x_BLD = model.encode(params, t.inputs_BL, *context, causal=config.name == "clm", dropout_keys_B=dropout_keys_B)
        logits_at = model.logits(params, x_BLD)

        def losses_at(predict_BK: jax.Array, labels_BK: jax.Array, weights_BK: jax.Array) -> TokenLosses:
            logits_BKV = logits_at(predict_BK)
            with jax.named_scope("loss"):
                return token_losses(logits_BKV, labels_BK, weights_BK)

        return _in_chunks(losses_at, logits_chunks, t.predict_BK, t.labels_BK, t.weights_BK)

    def total(losses: TokenLosses, counts: tuple[jax.Array, ...]) -> tuple[jax.Array, dict[str, jax.Array]]:
        means = losses.means(counts[0], config.z_loss)
        return means["loss"] + means.get("z_loss", 0.0), means

    return Loss(predict, lambda t: (denominator(t.weights_BK),), total)


def _in_chunks(fn: Callable[..., TokenLosses], chunks: int, *slots_BK: jax.Array) -> TokenLosses:
    """Computes `fn(*slots_BK)` in chunks of the K prediction slots, one after another.

    The backward pass computes each chunk's logits again, so that those of a single chunk are in memory at a time.
    """
    number = slots_BK[0].shape[1]
    chunks = min(chunks, number)
    if chunks == 1:
        return fn(*slots_BK)
    padding = ((0, 0), (0, -number % chunks))  # prediction slots not in use
    slots_CBK = tuple(jnp.stack(jnp.split(jnp.pad(x, padding), chunks, axis=1)) for x in slots_BK)
    losses_CBK = jax.lax.map(jax.checkpoint(lambda slots_BK: fn(*slots_BK)), slots_CBK)
    return jax.tree.map(lambda x_CBK: jnp.concatenate(list(x_CBK), axis=1)[:, :number], losses_CBK)


def denominator(weights: jax.Array) -> jax.Array:
    """Number of weights that are 1, at least 1."""
    return jnp.maximum(weights.sum(), 1.0)


def token_losses(logits_BKV: jax.Array, labels_BK: jax.Array, weights_BK: jax.Array) -> TokenLosses:
    """Cross-entropy and accuracy of each prediction; a label that ties for the largest logit is correct."""
    max_BK, label_BK, log_z_BK = _relative_to_max(logits_BKV, labels_BK)
    return TokenLosses(
        loss_BK=(log_z_BK - label_BK) * weights_BK,
        squared_log_z_BK=jnp.square(max_BK + log_z_BK) * weights_BK,
        correct_BK=jnp.where(label_BK == 0.0, weights_BK, 0.0),
    )


def log_probabilities(logits_BKV: jax.Array, labels_BK: jax.Array) -> jax.Array:
    """Log-probabilities of the labels, float32 (B, K)."""
    _, label_BK, log_z_BK = _relative_to_max(logits_BKV, labels_BK)
    return label_BK - log_z_BK


def _relative_to_max(logits_BKV: jax.Array, labels_BK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest logit (without a gradient), and relative to it the label's logit and log Z; each (B, K).

    The only operations across V are reductions, no gather, so that V may be split over devices.
    """
    max_BK = max_last_axis(logits_BKV)
    shifted_BKV = logits_BKV - max_BK[..., None]
    ids_V = jax.lax.broadcasted_iota(jnp.int32, logits_BKV.shape, 2)
    label_BK = jnp.where(ids_V == labels_BK[..., None], shifted_BKV, 0.0).sum(-1)
    return max_BK, label_BK, jnp.log(jnp.exp(shifted_BKV).sum(-1))
