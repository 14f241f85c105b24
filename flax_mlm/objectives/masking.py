"""Which tokens are hidden, and how: (tokens, row number, key) -> inputs, predicted positions, labels, weights.

Pure functions of static shape, run inside jit. A row is masked from its tokens and its own key alone, so
masks are the same however the batch is split over devices, hosts, microbatches and restarts.

Shapes: B rows of a batch, L tokens of a row, K slots for predicted positions, V vocabulary.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mlm.config.schema import ObjectiveConfig

if TYPE_CHECKING:
    from flax_mlm.data.tokenizer import Tokenizer

_RATE_UNIT = 100_000  # rates count in hundred-thousandths, so that rounding is integer arithmetic
_WORD_PASSES = 4


class Vocabulary(NamedTuple):
    """What masking has to know of a vocabulary; put on the device once."""

    is_special: jax.Array  # (V,) bool: never predicted, never drawn as a random token
    starts_word: jax.Array  # (V,) bool
    ordinary_ids: jax.Array  # (R,) int32, the ids that are not special
    pad_id: int
    cls_id: int
    mask_id: int


class Rates(NamedTuple):
    """Shares; numbers, or arrays that change from step to step."""

    mask: Any  # of the maskable tokens, to be predicted
    mask_replace_prob: Any  # of those, shown as [MASK]
    random_replace_prob: Any  # of those, shown as a random token


class Masked(NamedTuple):
    """One masked batch. Slots in use come first, by ascending position; the others hold zeros."""

    inputs_BL: jax.Array  # int32
    positions_BK: jax.Array  # int32
    labels_BK: jax.Array  # int32, the original ids
    weights_BK: jax.Array  # float32, 1 for a slot in use


def rates(objective: ObjectiveConfig, mask_rate: Any) -> Rates:
    """Those of an objective that do not move, with another share to be predicted."""
    return Rates(mask_rate, objective.mask_replace_prob, objective.random_replace_prob)


def vocabulary(tokenizer: "Tokenizer") -> Vocabulary:
    """The lookup tables of a tokenizer, as device arrays."""
    return Vocabulary(
        is_special=jnp.asarray(tokenizer.is_special),
        starts_word=jnp.asarray(tokenizer.starts_word),
        ordinary_ids=jnp.asarray(np.flatnonzero(~tokenizer.is_special), jnp.int32),
        pad_id=int(tokenizer.pad_id),
        cls_id=int(tokenizer.cls_id),
        mask_id=int(tokenizer.mask_id),
    )


def segment_ids(tokens_BL: jax.Array, vocab: Vocabulary) -> jax.Array:
    """1, 2, 3 ... for the segments of a row, each opened by its [CLS]; 0 at [PAD]."""
    segments_BL = jnp.cumsum((tokens_BL == vocab.cls_id).astype(jnp.int32), axis=1)
    return jnp.where(tokens_BL == vocab.pad_id, 0, segments_BL)


def positions(segment_ids_BL: jax.Array) -> jax.Array:
    """The place of each token inside its segment, from 0."""
    begins_BL = segment_ids_BL != jnp.roll(segment_ids_BL, 1, axis=1)
    place_1L = jnp.arange(segment_ids_BL.shape[1], dtype=jnp.int32)[None]
    return place_1L - lax.cummax(jnp.where(begins_BL, place_1L, 0), axis=1)


def max_predictions_per_row(seq_len: int, largest_rate: float) -> int:
    """K: as many slots as the fullest row, `seq_len` less its [CLS] and [SEP], can need."""
    units = int(np.round(np.float32(largest_rate) * np.float32(_RATE_UNIT)))
    return max(1, (units * (seq_len - 2) + _RATE_UNIT // 2) // _RATE_UNIT)


def row_key(key: jax.Array, row_id_2: jax.Array) -> jax.Array:
    """The key of one row of the stream, from the uint32 halves of its number; all that is random in it follows."""
    return jax.random.fold_in(jax.random.fold_in(key, row_id_2[0]), row_id_2[1])


def mask_tokens(
    tokens_BL: jax.Array,
    row_ids_B2: jax.Array,
    key: jax.Array,
    vocab: Vocabulary,
    objective: ObjectiveConfig,
    rates: Rates,
    max_predictions_per_row: int,
) -> Masked:
    """Hides part of each row, the original ids being what the model is to predict.

    Exactly `round(rates.mask * maskable tokens)` positions are taken per row, without replacement, never a
    special token, and at least one where any token is maskable. Halves round up; the rate counts in
    hundred-thousandths and the product is an integer (below 2**32 up to L = 42,949): all devices agree.
    The selected tokens are then shown as [MASK], as a random ordinary token, or unchanged (BERT,
    arXiv:1810.04805, section 3.1: 80%, 10%, 10%). `objective.masking` says how they are chosen
    (no word or span goes across a special token):

    * `token`: each alone.
    * `whole_word`: all pieces of a word together, as in BERT's whole-word-masking models
      (github.com/google-research/bert, create_pretraining_data.py): words in random order, those that no
      longer fit being skipped. This takes `_WORD_PASSES` passes, the last over single-piece words; a row may
      fall short when too few of those are left. A row none of whose words fits is masked token by token.
    * `span`: runs of whole words (SpanBERT, arXiv:1907.10529, section 3.1). A row is cut into spans, each
      ending after a word with probability `span_stop` and at the latest after `span_max_words`; the spans
      are taken in random order, the last one cut to the exact count. As there, a span is replaced as one.
      (Lengths are geometric and clipped, mean 4.5 words at 0.2 and 10; SpanBERT redraws those over 10: 3.8.)

    Args:
      tokens_BL: int32 rows.
      row_ids_B2: uint32 [high, low] halves of each row's number in the training stream.
      key: of the whole run; a row uses fold_in(fold_in(key, high), low).
      rates: may change from step to step.
      max_predictions_per_row: K, as `max_predictions_per_row` gives it for the largest rate.
    """

    def mask_row(
        tokens_L: jax.Array, row_id_2: jax.Array, key: jax.Array, vocab: Vocabulary, rate_units: jax.Array, shown: Rates
    ) -> Masked:
        score_L, stop_L, replace_L, random_L = jax.random.bits(row_key(key, row_id_2), (4, tokens_L.size), jnp.uint32)
        place_L = jnp.arange(tokens_L.size, dtype=jnp.int32)
        maskable_L = ~vocab.is_special[tokens_L]
        maskable = maskable_L.sum(dtype=jnp.uint32)
        wanted = ((rate_units * maskable + _RATE_UNIT // 2) // _RATE_UNIT).astype(jnp.int32)
        wanted = jnp.minimum(jnp.maximum(wanted, jnp.minimum(maskable.astype(jnp.int32), 1)), max_predictions_per_row)

        # Units are chosen whole: `start` and `length` of the one that each token belongs to.
        start_L, length_L = place_L, jnp.ones_like(place_L)
        if objective.masking != "token":
            after_special_L = jnp.roll(~maskable_L, 1).at[0].set(True)
            begins_L = vocab.starts_word[tokens_L] | after_special_L | ~maskable_L
            if objective.masking == "span":
                breaks_L = begins_L & (after_special_L | ~maskable_L | (_uniform(stop_L) < objective.span_stop))
                word_L = jnp.cumsum(begins_L.astype(jnp.int32))
                words_since_break_L = word_L - lax.cummax(jnp.where(breaks_L, word_L, 0))
                begins_L &= words_since_break_L % objective.span_max_words == 0
            start_L, length_L = _extents(begins_L, place_L)
        if objective.masking == "whole_word":
            fits = (maskable_L & (length_L <= wanted)).any()
            start_L, length_L = jnp.where(fits, start_L, place_L), jnp.where(fits, length_L, 1)

        # Tokens sorted by the random score of their unit, those of one unit side by side and in order. As one number,
        # the score's upper bits and then the place, since XLA:CPU takes four times as long to sort pairs.
        score_L = jnp.where(maskable_L, score_L[start_L] >> 1, jnp.uint32(0xFFFFFFFF))
        place_bits = (tokens_L.size - 1).bit_length()
        sorted_L = lax.sort((score_L >> place_bits << place_bits) | place_L.astype(jnp.uint32))
        order_L = (sorted_L & ((1 << place_bits) - 1)).astype(jnp.int32)
        if objective.masking == "whole_word":
            taken_L = _whole_units(length_L[order_L], (place_L - start_L)[order_L], maskable_L[order_L], wanted)
        else:  # the first, so that there are no more than K to be sorted
            order_L, taken_L = order_L[:max_predictions_per_row], place_L[:max_predictions_per_row] < wanted
        ascending_K = lax.sort(jnp.where(taken_L, order_L, tokens_L.size))[:max_predictions_per_row]

        used_K = ascending_K < tokens_L.size
        positions_K = jnp.where(used_K, ascending_K, 0)
        labels_K = tokens_L[positions_K]
        decide_K = start_L[positions_K] if objective.masking == "span" else positions_K
        u_K = _uniform(replace_L[decide_K])
        random_K = vocab.ordinary_ids[random_L[positions_K] % vocab.ordinary_ids.size]
        shown_K = jnp.where(u_K < shown.mask_replace_prob + shown.random_replace_prob, random_K, labels_K)
        shown_K = jnp.where(u_K < shown.mask_replace_prob, vocab.mask_id, shown_K)
        return Masked(
            inputs_BL=tokens_L.at[ascending_K].set(shown_K, mode="drop"),
            positions_BK=positions_K,
            labels_BK=jnp.where(used_K, labels_K, 0),
            weights_BK=used_K.astype(jnp.float32),
        )

    mask_rows = jax.vmap(mask_row, in_axes=(0, 0, None, None, None, None))
    rate_units = jnp.round(jnp.asarray(rates.mask, jnp.float32) * _RATE_UNIT).astype(jnp.uint32)
    with jax.named_scope("mask_tokens"):
        return mask_rows(tokens_BL, row_ids_B2, key, vocab, rate_units, rates)


def _uniform(bits: jax.Array) -> jax.Array:
    """Random uint32 -> float32 in [0, 1)."""
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def _extents(begins_L: jax.Array, place_L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Start and length of the unit around each token, units running from one begin to the next."""
    start_L = lax.cummax(jnp.where(begins_L, place_L, 0))
    next_L = lax.cummin(jnp.where(begins_L, place_L, place_L.size), reverse=True)
    end_L = jnp.roll(next_L, -1).at[-1].set(place_L.size)
    return start_L, end_L - start_L


def _whole_units(length_L: jax.Array, offset_L: jax.Array, maskable_L: jax.Array, wanted: jax.Array) -> jax.Array:
    """Which tokens, given unit after unit, to take so that no unit is cut and at most `wanted` are taken."""
    taken_L = jnp.zeros_like(maskable_L)
    for last in [False] * (_WORD_PASSES - 1) + [True]:
        left = wanted - taken_L.sum(dtype=jnp.int32)
        fits_L = maskable_L & ~taken_L & (length_L <= (jnp.minimum(left, 1) if last else left))
        through_unit_L = jnp.cumsum(fits_L.astype(jnp.int32)) + length_L - 1 - offset_L
        taken_L |= fits_L & (through_unit_L <= left)
    return taken_L
