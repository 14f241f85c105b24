"""Model inputs and prediction targets of a batch, for every objective."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mlm.config.schema import ObjectiveConfig
from flax_mlm.distributed.mesh import per_row
from flax_mlm.objectives import masking
from flax_mlm.objectives.masking import Rates
from flax_mlm.objectives.rows import Vocabulary, positions, row_keys, segment_ids


class Targets(NamedTuple):
    """Model inputs and prediction targets."""

    inputs_BL: jax.Array  # int32
    segment_ids_BL: jax.Array  # int32, 0 at padding
    positions_BL: jax.Array  # int32, restarting in each segment
    predict_BK: jax.Array  # int32, the positions that are predicted
    labels_BK: jax.Array  # int32
    weights_BK: jax.Array  # float32, 1 for a prediction slot in use
    # With rtd only:
    ordinary_BL: Any = None  # float32, 1 for a token that is not special
    sample_keys_B: Any = None  # keys (B,) for sampling the generator's replacements


def max_predictions_per_row(objective: ObjectiveConfig, seq_len: int, largest_rate: float) -> int:
    """K, the prediction slots of a row."""
    return seq_len - 1 if objective.name == "clm" else masking.max_predictions_per_row(seq_len, largest_rate)


def make_targets(
    objective: ObjectiveConfig, rows: dict[str, jax.Array], key: jax.Array, vocab: Vocabulary, rates: Rates, K: int
) -> Targets:
    """Inputs and targets of rows.

    With `mlm` and `rtd` see `masking.mask_tokens`. With `clm` nothing is masked: position i predicts token i + 1 of the
    same segment. With `attend_across_documents` a row is one segment to the model; the predictions are the same.

    Args:
      rows: `tokens` int32 (B, L) and `row_ids` uint32 (B, 2), see `data.pipeline`.
      key: key of the whole run.
      K: number of prediction slots, as `max_predictions_per_row` gives it for the largest rate.
    """

    def local_targets(rows: dict[str, jax.Array], key: jax.Array, vocab: Vocabulary, rates: Rates) -> Targets:
        tokens_BL = rows["tokens"]
        documents_BL = segment_ids(tokens_BL, vocab)
        segment_ids_BL = jnp.minimum(documents_BL, 1) if objective.attend_across_documents else documents_BL
        context = segment_ids_BL, positions(segment_ids_BL)
        if objective.name == "clm":
            is_predicted_BK = (documents_BL[:, 1:] == documents_BL[:, :-1]) & (documents_BL[:, 1:] > 0)
            predict_BK = jax.lax.broadcasted_iota(jnp.int32, is_predicted_BK.shape, 1)
            weights_BK = is_predicted_BK.astype(jnp.float32)
            return Targets(tokens_BL, *context, predict_BK, tokens_BL[:, 1:], weights_BK)
        masked = masking.mask_tokens(tokens_BL, row_keys(key, rows["row_ids"]), vocab, objective, rates, K)
        targets = Targets(masked.inputs_BL, *context, masked.positions_BK, masked.labels_BK, masked.weights_BK)
        if objective.name == "mlm":
            return targets
        sample_key = jax.random.fold_in(key, 2**32 - 1)  # the high half of no row's number
        ordinary_BL = (~vocab.is_special[tokens_BL]).astype(jnp.float32)
        return targets._replace(ordinary_BL=ordinary_BL, sample_keys_B=row_keys(sample_key, rows["row_ids"]))

    rates = Rates(*(jnp.asarray(x, jnp.float32) for x in rates))
    return per_row(local_targets, rows, key, vocab, rates)
