"""What is predicted, and how well: targets of `mlm` and `clm`, and the loss as sums and counts.

Sums are divided once, by the count over the whole global batch, so that the loss and its gradient are the same
on one device, on many, and with gradient accumulation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flax_mlm import masking, sharding
from flax_mlm.config import ObjectiveConfig


class Scored(NamedTuple):
    """How well each predicted token was said, float32 (B, K); 0 in slots that are not in use."""

    loss_BK: jax.Array  # nats, cross-entropy
    squared_log_z_BK: jax.Array  # log Z is the log of the sum of exp(score) over the vocabulary; see `z_loss`
    correct_BK: jax.Array  # 1 where no piece is likelier than the right one


def num_slots(objective: ObjectiveConfig, seq_len: int, largest_rate: float) -> int:
    """K, the predicted slots of a row."""
    return seq_len - 1 if objective.name == "clm" else masking.num_slots(seq_len, largest_rate)


class Targets(NamedTuple):
    """What the model sees and what it must say."""

    inputs_BL: jax.Array  # int32
    segment_ids_BL: jax.Array  # int32, 0 at padding
    positions_BL: jax.Array  # int32, restarting in each segment
    predict_BK: jax.Array  # int32, the positions that are predicted
    labels_BK: jax.Array  # int32
    weights_BK: jax.Array  # float32, 1 for a slot in use


def targets(
    objective: ObjectiveConfig,
    rows: dict[str, jax.Array],
    key: jax.Array,
    vocab: masking.Vocabulary,
    mask_rate: jax.Array | float,
    slots: int,
) -> Targets:
    """Inputs and targets of the rows, for either objective.

    With `mlm` see `masking.mask_tokens`. With `clm` nothing is hidden: position i predicts token i + 1 of the same
    segment.

    Args:
      rows: `tokens` int32 (B, L) and `row_ids` uint32 (B, 2), see `data.pipeline`.
    """

    def of_rows(rows: dict[str, jax.Array], key: jax.Array, vocab: masking.Vocabulary, mask_rate: jax.Array) -> Targets:
        tokens_BL = rows["tokens"]
        segment_ids_BL = masking.segment_ids(tokens_BL, vocab)
        context = segment_ids_BL, masking.positions(segment_ids_BL)
        if objective.name == "mlm":
            masked = masking.mask_tokens(tokens_BL, rows["row_ids"], key, vocab, objective, mask_rate, slots)
            return Targets(masked.inputs_BL, *context, masked.positions_BK, masked.labels_BK, masked.weights_BK)
        same_BK = (segment_ids_BL[:, 1:] == segment_ids_BL[:, :-1]) & (segment_ids_BL[:, 1:] > 0)
        predict_BK = jax.lax.broadcasted_iota(jnp.int32, same_BK.shape, 1)
        return Targets(tokens_BL, *context, predict_BK, tokens_BL[:, 1:], same_BK.astype(jnp.float32))

    return sharding.per_row(of_rows, rows, key, vocab, jnp.asarray(mask_rate, jnp.float32))


def log_probabilities(scores_BKV: jax.Array, labels_BK: jax.Array) -> jax.Array:
    """Log-probabilities (B, K) of the labels."""
    _, below_BK, spread_BK = _below_best(scores_BKV, labels_BK)
    return below_BK - spread_BK


def score(scores_BKV: jax.Array, labels_BK: jax.Array, weights_BK: jax.Array) -> Scored:
    """Cross-entropy and accuracy of each slot in use; a label that shares the first place is right."""
    best_BK, below_BK, spread_BK = _below_best(scores_BKV, labels_BK)
    return Scored(
        loss_BK=(spread_BK - below_BK) * weights_BK,
        squared_log_z_BK=jnp.square(best_BK + spread_BK) * weights_BK,
        correct_BK=jnp.where(below_BK == 0.0, weights_BK, 0.0),
    )


def _below_best(scores_BKV: jax.Array, labels_BK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best score, as a constant; the label's less that, at most 0; and the log of the sum of all exp(score - best);
    (B, K).

    Written with reductions over V alone (no gather), so that V may be split over devices.
    """
    best_BK = jax.lax.stop_gradient(scores_BKV.max(-1))
    shifted_BKV = scores_BKV - best_BK[..., None]
    ids_V = jax.lax.broadcasted_iota(jnp.int32, scores_BKV.shape, 2)
    label_BK = jnp.where(ids_V == labels_BK[..., None], shifted_BKV, 0.0).sum(-1)
    return best_BK, label_BK, jnp.log(jnp.exp(shifted_BKV).sum(-1))
