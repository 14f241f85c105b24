"""Replaced-token detection (ELECTRA, arXiv:2003.10555).

A generator fills the masked tokens, and a discriminator, the encoder that is kept, classifies every token as original
or replaced. Both are trained in one step; model/electra.py has the networks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mlm.config.schema import ObjectiveConfig
from flax_mlm.distributed.mesh import reshard_like
from flax_mlm.model.heads import Model
from flax_mlm.objectives.language_modelling import Loss, TokenLosses, denominator, token_losses
from flax_mlm.objectives.targets import Targets


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
        generator_keys_B = jax.tree.map(fold_in, dropout_keys_B)  # None stays None
        with jax.named_scope("generator"):
            logits_BKV = generator.apply(
                params, t.inputs_BL, *context, predict_BK=t.predict_BK, dropout_keys_B=generator_keys_B
            )
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

    def counts(t: Targets) -> tuple[jax.Array, ...]:
        return denominator(t.weights_BK), denominator(t.ordinary_BL)

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

    return Loss(predict, counts, total)


def sample_tokens(logits_BKV: jax.Array, keys_B: jax.Array, vocab_size: int) -> jax.Array:
    """Samples a token for every prediction slot from the softmax of its logits, int32 (B, K), by Gumbel noise.

    Args:
      logits_BKV: float32; columns from `vocab_size` on belong to no token.
      keys_B: one key per row, so that a row's samples do not depend on how the batch is split.
    """
    noise_BKV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BKV.shape[1:]))(keys_B)
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
