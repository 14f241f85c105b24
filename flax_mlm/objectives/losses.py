"""The losses, as sums and counts: cross-entropy of `mlm` and `clm`, and replaced-token detection, `rtd`.

Sums are divided once, by the count over the whole global batch, so that the loss and its gradient are the same on one
device, on many, and with gradient accumulation.

In replaced-token detection (ELECTRA, arXiv:2003.10555) a generator fills the masked tokens, and a discriminator, the
encoder that is kept, classifies every token as original or replaced. Both are trained in one step; model/electra.py has
the networks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mlm.config.schema import ObjectiveConfig
from flax_mlm.distributed.mesh import reshard_like
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


class DetectionLosses(NamedTuple):
    """Losses of the generator at K prediction slots and of the discriminator at L tokens."""

    generator: TokenLosses  # (B, K)
    loss_BL: jax.Array  # float32, binary cross-entropy in nats; 0 at special tokens
    correct_BL: jax.Array  # float32, 1 where the likelier class is right; 0 at special tokens
    replaced_BL: jax.Array  # float32, 1 where the token is not the original
    ordinary_BL: jax.Array  # float32, 1 where the token is not special


def replaced_token_detection(generator: Model, discriminator: Model, vocab_size: int, config: ObjectiveConfig) -> Loss:
    """The generator's mean cross-entropy over the predictions (and its z_loss) + `discriminator_weight` × the
    discriminator's mean binary cross-entropy over the ordinary tokens (ELECTRA, section 3.1).

    No gradient flows through the sampled tokens.
    """

    def predict(params: Any, t: Targets, dropout_keys_B: Any) -> DetectionLosses:
        context = t.segment_ids_BL, t.positions_BL
        fold_in = jax.vmap(lambda key: jax.random.fold_in(key, 2**32 - 1))
        keys_B = jax.tree.map(fold_in, dropout_keys_B)  # None stays None
        with jax.named_scope("generator"):
            logits_BKV = generator.apply(params, t.inputs_BL, *context, predict_BK=t.predict_BK, dropout_keys_B=keys_B)
            generator_losses = token_losses(logits_BKV, t.labels_BK, t.weights_BK)
            sampled_BK = sample_tokens(logits_BKV, t.sample_keys_B, vocab_size)
        corrupted_BL, replaced_BL = corrupt(t, sampled_BK)
        x_BLD = discriminator.encode(params, corrupted_BL, *context, dropout_keys_B=dropout_keys_B)
        logits_BL = discriminator.logits(params, x_BLD)
        with jax.named_scope("loss"):
            return DetectionLosses(
                generator_losses,
                loss_BL=(jax.nn.softplus(logits_BL) - replaced_BL * logits_BL) * t.ordinary_BL,
                correct_BL=jnp.where((logits_BL > 0.0) == (replaced_BL > 0.0), t.ordinary_BL, 0.0),
                replaced_BL=replaced_BL,
                ordinary_BL=t.ordinary_BL,
            )

    def total(losses: DetectionLosses, counts: tuple[jax.Array, ...]) -> tuple[jax.Array, dict[str, jax.Array]]:
        predictions, ordinary = counts
        generator_means = losses.generator.means(predictions, config.z_loss)
        discriminator_loss = losses.loss_BL.sum(-1).sum() / ordinary
        loss = generator_means["loss"] + config.discriminator_weight * discriminator_loss
        means = {
            "loss": loss,
            "accuracy": losses.correct_BL.sum(-1).sum() / ordinary,
            "discriminator_loss": discriminator_loss,
            "generator_loss": generator_means.pop("loss"),
            "generator_accuracy": generator_means.pop("accuracy"),
            "replaced": losses.replaced_BL.sum(-1).sum() / ordinary,
            **generator_means,
        }
        return loss + means.get("z_loss", 0.0), means

    return Loss(predict, lambda t: (denominator(t.weights_BK), denominator(t.ordinary_BL)), total)


def sample_tokens(logits_BKV: jax.Array, keys_B: jax.Array, vocab_size: int) -> jax.Array:
    """Samples a token for every prediction slot from the softmax of its logits, int32 (B, K), by Gumbel noise.

    Args:
      logits_BKV: float32; columns from `vocab_size` on belong to no token.
      keys_B: one key per row, so that a row's samples do not depend on how the batch is split.
    """
    noise_BKV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BKV.shape[1:], jnp.float32, mode="low"))(keys_B)
    logits_BKV = jax.lax.stop_gradient(logits_BKV)
    logits_BKV += reshard_like(noise_BKV, logits_BKV)
    is_token_V = jax.lax.broadcasted_iota(jnp.int32, logits_BKV.shape, 2) < vocab_size
    return jnp.where(is_token_V, logits_BKV, -jnp.inf).argmax(-1).astype(jnp.int32)


def corrupt(t: Targets, sampled_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Puts the sampled tokens into the prediction slots in use.

    Returns:
      The rows, int32 (B, L), and where their tokens are not the original ones, float32 (B, L).
    """
    index_BKL = jax.lax.broadcasted_iota(jnp.int32, (*sampled_BK.shape, t.inputs_BL.shape[1]), 2)
    is_slot_BKL = (t.predict_BK[..., None] == index_BKL) & (t.weights_BK[..., None] > 0.0)
    sampled_BL = jnp.where(is_slot_BKL, sampled_BK[..., None], 0).sum(1)
    replaced_BKL = is_slot_BKL & (sampled_BK != t.labels_BK)[..., None]
    return jnp.where(is_slot_BKL.any(1), sampled_BL, t.inputs_BL), replaced_BKL.any(1).astype(jnp.float32)
