"""What is predicted, and how well: targets, and the loss of `mlm` and `clm` as sums and counts. (`rtd`: detection.py)

Sums are divided once, by the count over the whole global batch, so that the loss and its gradient are the same
on one device, on many, and with gradient accumulation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mlm.config.schema import ObjectiveConfig
from flax_mlm.distributed.mesh import per_row
from flax_mlm.model.elementwise import max_last_axis
from flax_mlm.model.heads import Model
from flax_mlm.objectives import masking


class TokenLosses(NamedTuple):
    """How well each predicted token was said, float32 (B, K); 0 in slots that are not in use."""

    loss_BK: jax.Array  # nats, cross-entropy
    squared_log_z_BK: jax.Array  # log Z is the log of the sum of exp(score) over the vocabulary; see `z_loss`
    correct_BK: jax.Array  # 1 where no piece is likelier than the right one

    def means(self, count: jax.Array, z_loss: float) -> dict[str, jax.Array]:
        """loss, accuracy and, where it has a coefficient, z_loss, which is trained on beside the loss."""
        sums = {"loss": self.loss_BK, "accuracy": self.correct_BK}
        if z_loss:
            sums["z_loss"] = z_loss * self.squared_log_z_BK
        return {name: x.sum(-1).sum() / count for name, x in sums.items()}


class Loss(NamedTuple):
    """A loss as sums over a part of the batch, each divided by its count over all of it."""

    predict: Callable[..., Any]  # (parameters, Targets, dropout keys (B,) or None) -> arrays that have the rows first
    counts: Callable[["Targets"], tuple[jax.Array, ...]]  # of the whole batch; that of predicted tokens first
    # (predictions, counts) -> what is trained on, metrics; parts add up
    total: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def max_predictions_per_row(objective: ObjectiveConfig, seq_len: int, largest_rate: float) -> int:
    """K, the predicted slots of a row."""
    return seq_len - 1 if objective.name == "clm" else masking.max_predictions_per_row(seq_len, largest_rate)


class Targets(NamedTuple):
    """What the model sees and what it must say."""

    inputs_BL: jax.Array  # int32
    segment_ids_BL: jax.Array  # int32, 0 at padding
    positions_BL: jax.Array  # int32, restarting in each segment
    predict_BK: jax.Array  # int32, the positions that are predicted
    labels_BK: jax.Array  # int32
    weights_BK: jax.Array  # float32, 1 for a slot in use
    # With rtd only:
    ordinary_BL: Any = None  # float32, 1 for a token that is not special
    sample_keys_B: Any = None  # keys (B,); what fills the masks follows from them


def targets(
    objective: ObjectiveConfig,
    rows: dict[str, jax.Array],
    key: jax.Array,
    vocab: masking.Vocabulary,
    rates: masking.Rates,
    slots: int,
) -> Targets:
    """Inputs and targets of the rows, for any objective.

    With `mlm` and `rtd` see `masking.mask_tokens`. With `clm` nothing is hidden: position i predicts token i + 1 of the
    same segment. With `attend_across_documents` the model sees one segment in each row; what is predicted is the same.

    Args:
      rows: `tokens` int32 (B, L) and `row_ids` uint32 (B, 2), see `data.pipeline`.
    """

    def of_rows(rows: dict[str, jax.Array], key: jax.Array, vocab: masking.Vocabulary, rates: masking.Rates) -> Targets:
        tokens_BL = rows["tokens"]
        segment_ids_BL = masking.segment_ids(tokens_BL, vocab)
        seen_BL = jnp.minimum(segment_ids_BL, 1) if objective.attend_across_documents else segment_ids_BL
        context = seen_BL, masking.positions(seen_BL)
        if objective.name != "clm":
            masked = masking.mask_tokens(tokens_BL, rows["row_ids"], key, vocab, objective, rates, slots)
            found = Targets(masked.inputs_BL, *context, masked.positions_BK, masked.labels_BK, masked.weights_BK)
            if objective.name == "mlm":
                return found
            ordinary_BL = (~vocab.is_special[tokens_BL]).astype(jnp.float32)
            sample_key = jax.random.fold_in(key, 2**32 - 1)  # the high half of no row's number
            return found._replace(
                ordinary_BL=ordinary_BL,
                sample_keys_B=jax.vmap(masking.row_key, (None, 0))(sample_key, rows["row_ids"]),
            )
        same_BK = (segment_ids_BL[:, 1:] == segment_ids_BL[:, :-1]) & (segment_ids_BL[:, 1:] > 0)
        predict_BK = jax.lax.broadcasted_iota(jnp.int32, same_BK.shape, 1)
        return Targets(tokens_BL, *context, predict_BK, tokens_BL[:, 1:], same_BK.astype(jnp.float32))

    rates = masking.Rates(*(jnp.asarray(x, jnp.float32) for x in rates))
    return per_row(of_rows, rows, key, vocab, rates)


def language_modelling(model: Model, config: ObjectiveConfig, chunks: int = 1) -> Loss:
    """The mean cross-entropy of the predicted tokens, + `z_loss` × the mean of their (log Z)².

    Args:
      chunks: Into how many parts a row's slots are taken. Of several, a part's scores are made again for the backward
        pass, and never are there those of more than one.
    """

    def predict(params: Any, t: Targets, dropout_keys_B: Any) -> TokenLosses:
        context = t.segment_ids_BL, t.positions_BL
        x_BLD = model.encode(params, t.inputs_BL, *context, causal=config.name == "clm", dropout_keys_B=dropout_keys_B)
        scores_at = model.head(params, x_BLD)

        def of(slots: tuple[jax.Array, jax.Array, jax.Array]) -> TokenLosses:
            predict_BK, labels_BK, weights_BK = slots
            logits_BKV = scores_at(predict_BK)
            with jax.named_scope("loss"):
                return score(logits_BKV, labels_BK, weights_BK)

        slots = t.predict_BK, t.labels_BK, t.weights_BK
        number = t.labels_BK.shape[1]
        if (count := min(chunks, number)) == 1:
            return of(slots)
        fill = ((0, 0), (0, -number % count))  # with slots that are not in use
        parts = [jnp.stack(jnp.split(jnp.pad(x, fill), count, axis=1)) for x in slots]
        found = jax.lax.map(jax.checkpoint(of), tuple(parts))
        return jax.tree.map(lambda x: jnp.concatenate(list(x), axis=1)[:, :number], found)

    def total(scored: TokenLosses, counts: tuple[jax.Array, ...]) -> tuple[jax.Array, dict[str, jax.Array]]:
        (count,) = counts
        means = scored.means(count, config.z_loss)
        return means["loss"] + means.get("z_loss", 0.0), means

    return Loss(predict, lambda t: (at_least_1(t.weights_BK),), total)


def at_least_1(weights: jax.Array) -> jax.Array:
    """How many there are, and 1 where there are none: what sums are divided by."""
    return jnp.maximum(weights.sum(), 1.0)


def log_probabilities(logits_BKV: jax.Array, labels_BK: jax.Array) -> jax.Array:
    """Log-probabilities (B, K) of the labels."""
    _, below_BK, spread_BK = _below_best(logits_BKV, labels_BK)
    return below_BK - spread_BK


def score(logits_BKV: jax.Array, labels_BK: jax.Array, weights_BK: jax.Array) -> TokenLosses:
    """Cross-entropy and accuracy of each slot in use; a label that shares the first place is right."""
    best_BK, below_BK, spread_BK = _below_best(logits_BKV, labels_BK)
    return TokenLosses(
        loss_BK=(spread_BK - below_BK) * weights_BK,
        squared_log_z_BK=jnp.square(best_BK + spread_BK) * weights_BK,
        correct_BK=jnp.where(below_BK == 0.0, weights_BK, 0.0),
    )


def _below_best(logits_BKV: jax.Array, labels_BK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best score, as a constant; the label's less that, at most 0; and the log of the sum of all exp(score - best);
    (B, K).

    Written with reductions over V alone (no gather), so that V may be split over devices.
    """
    best_BK = max_last_axis(logits_BKV)
    shifted_BKV = logits_BKV - best_BK[..., None]
    ids_V = jax.lax.broadcasted_iota(jnp.int32, logits_BKV.shape, 2)
    label_BK = jnp.where(ids_V == labels_BK[..., None], shifted_BKV, 0.0).sum(-1)
    return best_BK, label_BK, jnp.log(jnp.exp(shifted_BKV).sum(-1))
