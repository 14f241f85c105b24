"""Replaced-token detection (ELECTRA, arXiv:2003.10555): a generator fills the masks, and the encoder says of every
token whether it is the original. Both in one step; the networks are in model/electra.py."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mlm.config.schema import ObjectiveConfig
from flax_mlm.distributed.mesh import reshard_like
from flax_mlm.model.heads import Model
from flax_mlm.objectives.language_modelling import Loss, Targets, TokenLosses, at_least_1, score


class Detected(NamedTuple):
    """How well the generator has filled K slots, and the discriminator judged L tokens, special ones left out."""

    generator: TokenLosses  # (B, K)
    loss_BL: jax.Array  # float32, nats; 0 at special tokens
    correct_BL: jax.Array  # float32, 1 where the likelier answer is right
    replaced_BL: jax.Array  # float32, 1 where the token is another one than the original
    ordinary_BL: jax.Array  # float32, 1 where the token is judged


def replaced_tokens(generator: Model, discriminator: Model, vocab_size: int, config: ObjectiveConfig) -> Loss:
    """The generator's mean cross-entropy over the predicted tokens (and its z_loss) + `discriminator_weight` × the
    discriminator's mean binary cross-entropy over the ordinary tokens (ELECTRA §3.1). No gradient goes through what was
    drawn."""

    def predict(params: Any, t: Targets, dropout_keys_B: Any) -> Detected:
        context = t.segment_ids_BL, t.positions_BL
        generator_keys_B = dropout_keys_B
        if dropout_keys_B is not None:  # another dropout than that of the discriminator
            generator_keys_B = jax.vmap(lambda key: jax.random.fold_in(key, 2**32 - 1))(dropout_keys_B)
        with jax.named_scope("generator"):
            logits_BKV = generator.apply(
                params, t.inputs_BL, *context, predict_BK=t.predict_BK, dropout_keys_B=generator_keys_B
            )
            filled = score(logits_BKV, t.labels_BK, t.weights_BK)
            drawn_BK = draw(logits_BKV, t.sample_keys_B, vocab_size)
        corrupted_BL, replaced_BL = corrupt(t, drawn_BK)
        x_BLD = discriminator.encode(params, corrupted_BL, *context, dropout_keys_B=dropout_keys_B)
        logits_BL = discriminator.head(params, x_BLD)
        with jax.named_scope("loss"):
            return Detected(
                filled,
                (jax.nn.softplus(logits_BL) - replaced_BL * logits_BL) * t.ordinary_BL,
                jnp.where((logits_BL > 0.0) == (replaced_BL > 0.0), t.ordinary_BL, 0.0),
                replaced_BL,
                t.ordinary_BL,
            )

    def counts(t: Targets) -> tuple[jax.Array, ...]:
        return at_least_1(t.weights_BK), at_least_1(t.ordinary_BL)

    def total(found: Detected, counts: tuple[jax.Array, ...]) -> tuple[jax.Array, dict[str, jax.Array]]:
        predicted, ordinary = counts
        of_generator = found.generator.means(predicted, config.z_loss)
        discriminator_loss = found.loss_BL.sum(-1).sum() / ordinary
        loss = of_generator["loss"] + config.discriminator_weight * discriminator_loss
        means = {
            "loss": loss,
            "accuracy": found.correct_BL.sum(-1).sum() / ordinary,
            "discriminator_loss": discriminator_loss,
            "generator_loss": of_generator.pop("loss"),
            "generator_accuracy": of_generator.pop("accuracy"),
            "replaced": found.replaced_BL.sum(-1).sum() / ordinary,
            **of_generator,
        }
        return loss + means.get("z_loss", 0.0), means

    return Loss(predict, counts, total)


def draw(logits_BKV: jax.Array, keys_B: Any, vocab_size: int) -> jax.Array:
    """A piece for every slot, int32 (B, K), as likely as the generator finds it: the best after Gumbel noise.

    Args:
      logits_BKV: float32; rows of V from `vocab_size` on are not pieces.
      keys_B: one a row, so that a row's do not depend on how the batch is split.
    """
    noise_BKV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BKV.shape[1:]))(keys_B)
    logits_BKV = jax.lax.stop_gradient(logits_BKV)
    logits_BKV += reshard_like(noise_BKV, logits_BKV)
    is_piece_V = jax.lax.broadcasted_iota(jnp.int32, logits_BKV.shape, 2) < vocab_size
    return jnp.where(is_piece_V, logits_BKV, -jnp.inf).argmax(-1).astype(jnp.int32)


def corrupt(t: Targets, drawn_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rows with what was drawn in place of the masks, int32 (B, L), and float32 (B, L), 1 where it is another token
    than the original."""
    place_BKL = jax.lax.broadcasted_iota(jnp.int32, (*drawn_BK.shape, t.inputs_BL.shape[1]), 2)
    here_BKL = (t.predict_BK[..., None] == place_BKL) & (t.weights_BK[..., None] > 0.0)
    other_BK = drawn_BK != t.labels_BK
    corrupted_BL = jnp.where(here_BKL.any(1), jnp.where(here_BKL, drawn_BK[..., None], 0).sum(1), t.inputs_BL)
    return corrupted_BL, (here_BKL & other_BK[..., None]).any(1).astype(jnp.float32)
