"""Masking: which tokens of a row the model predicts, and what it sees in their place.

A row is masked in three steps:

1. units: `token_units`, `word_units` or `span_units` divides the row into masking units: tokens selected together;
2. selection: `select_units` takes units in random order until the row has its number of predictions;
3. replacement: `replace` shows a selected token as [MASK], as a random token, or unchanged.

All functions are pure, have static shapes and run inside jit. The masks of a row depend on its tokens and its own key
alone, so they stay the same however the batch is split over devices, hosts, microbatches and restarts.

Shapes: B rows of a batch, L tokens of a row, K prediction slots of a row, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mlm.config.phases import Phase
from flax_mlm.config.schema import ObjectiveConfig
from flax_mlm.objectives.rows import Vocabulary

_RATE_UNIT = 100_000  # mask rates count in hundred-thousandths, so that rounding is integer arithmetic
_WORD_PASSES = 4


class Rates(NamedTuple):
    """Probabilities of masking: floats, or float32 scalars that change from step to step."""

    mask: Any  # fraction of the maskable tokens that is predicted
    mask_replace_prob: Any  # fraction of the predicted tokens that is shown as [MASK]
    random_replace_prob: Any  # fraction of the predicted tokens that is shown as a random token


class Masked(NamedTuple):
    """A masked batch. Prediction slots in use come first, by ascending position; the others hold zeros."""

    inputs_BL: jax.Array  # int32
    positions_BK: jax.Array  # int32
    labels_BK: jax.Array  # int32, the original ids
    weights_BK: jax.Array  # float32, 1 for a prediction slot in use


class Units(NamedTuple):
    """The masking unit that each token belongs to."""

    start_L: jax.Array  # int32, index of the unit's first token
    length_L: jax.Array  # int32, number of the unit's tokens


def rates(objective: ObjectiveConfig, mask_rate: Any) -> Rates:
    """Rates of an objective, with another mask rate."""
    return Rates(mask_rate, objective.mask_replace_prob, objective.random_replace_prob)


def rates_at(phase: Phase, progress: Any) -> Rates:
    """Rates at a fraction of a phase (0 to 1, a float or a float32 scalar)."""
    names = ("mask_rate", "mask_replace_prob", "random_replace_prob")
    return Rates(*(phase.value(f"objective.{name}", progress) for name in names))


def max_predictions_per_row(seq_len: int, largest_rate: float) -> int:
    """K: the predictions of the fullest row, which has `seq_len` tokens less a [CLS] and a [SEP]."""
    rate_units = int(np.round(np.float32(largest_rate) * np.float32(_RATE_UNIT)))
    return max(1, (rate_units * (seq_len - 2) + _RATE_UNIT // 2) // _RATE_UNIT)


def num_predictions(maskable_L: jax.Array, mask_rate: Any) -> jax.Array:
    """Number of predictions of a row, int32 (): `round(mask_rate * maskable tokens)`, at least 1 if any is maskable.

    Halves round up. Integer arithmetic makes all devices agree; it does not overflow uint32 up to L = 42,949.
    """
    rate_units = jnp.round(jnp.asarray(mask_rate, jnp.float32) * _RATE_UNIT).astype(jnp.uint32)
    maskable = maskable_L.sum(dtype=jnp.uint32)
    rounded = (rate_units * maskable + _RATE_UNIT // 2) // _RATE_UNIT
    return jnp.maximum(rounded, jnp.minimum(maskable, 1)).astype(jnp.int32)


def mask_tokens(
    tokens_BL: jax.Array, keys_B: jax.Array, vocab: Vocabulary, objective: ObjectiveConfig, rates: Rates, K: int
) -> Masked:
    """Masks `num_predictions` tokens of each row, without replacement and never a special token.

    `objective.masking` is the unit of selection: "token", "whole_word" or "span".

    Args:
      tokens_BL: int32 rows.
      keys_B: keys of the rows, see `rows.row_keys`.
      rates: may change from step to step.
      K: number of prediction slots, as `max_predictions_per_row` gives it for the largest rate.
    """

    def mask_row(tokens_L: jax.Array, key: jax.Array) -> Masked:
        # Random uint32, drawn for every token whether it needs them or not.
        order_L, stop_L, replace_L, random_L = jax.random.bits(key, (4, tokens_L.size), jnp.uint32)
        maskable_L = ~vocab.is_special[tokens_L]
        count = jnp.minimum(num_predictions(maskable_L, rates.mask), K)
        match objective.masking:
            case "token":
                units = token_units(tokens_L)
            case "whole_word":
                units = word_units(tokens_L, vocab, count)
            case _:
                units = span_units(tokens_L, vocab, stop_L, objective)
        positions_K = select_units(units, order_L, maskable_L, count, K, whole=objective.masking == "whole_word")
        # The tokens of a span are replaced alike, as in SpanBERT; those of a word each by itself, as in BERT.
        decide_K = units.start_L[positions_K] if objective.masking == "span" else positions_K
        inputs_L = replace(tokens_L, positions_K, _uniform(replace_L[decide_K]), random_L[positions_K], vocab, rates)
        used_K = positions_K < tokens_L.size
        return Masked(
            inputs_BL=inputs_L,
            positions_BK=jnp.where(used_K, positions_K, 0),
            labels_BK=jnp.where(used_K, tokens_L[positions_K], 0),
            weights_BK=used_K.astype(jnp.float32),
        )

    with jax.named_scope("mask_tokens"):
        return jax.vmap(mask_row)(tokens_BL, keys_B)


def token_units(tokens_L: jax.Array) -> Units:
    """Each token alone."""
    return Units(jnp.arange(tokens_L.size, dtype=jnp.int32), jnp.ones_like(tokens_L))


def word_units(tokens_L: jax.Array, vocab: Vocabulary, count: jax.Array) -> Units:
    """Whole words, as in BERT's whole-word-masking models (github.com/google-research/bert).

    A row none of whose words has at most `count` tokens is divided into single tokens.
    """
    words = _units(_word_starts(tokens_L, vocab)[0])
    fits = (~vocab.is_special[tokens_L] & (words.length_L <= count)).any()
    return jax.tree.map(lambda word_L, token_L: jnp.where(fits, word_L, token_L), words, token_units(tokens_L))


def span_units(tokens_L: jax.Array, vocab: Vocabulary, stop_L: jax.Array, objective: ObjectiveConfig) -> Units:
    """Runs of whole words (SpanBERT, arXiv:1907.10529, section 3.1).

    A span ends after a word with probability `span_stop`, and at the latest after `span_max_words` words. Lengths are
    geometric and clipped (mean 4.5 words at 0.2 and 10), where SpanBERT draws again what is above 10 (mean 3.8).

    Args:
      stop_L: random uint32.
    """
    word_starts_L, edges_L = _word_starts(tokens_L, vocab)
    breaks_L = edges_L | (word_starts_L & (_uniform(stop_L) < objective.span_stop))
    word_L = jnp.cumsum(word_starts_L.astype(jnp.int32))
    words_since_break_L = word_L - jax.lax.cummax(jnp.where(breaks_L, word_L, 0))
    return _units(word_starts_L & (words_since_break_L % objective.span_max_words == 0))


def select_units(
    units: Units, order_L: jax.Array, maskable_L: jax.Array, count: jax.Array, K: int, *, whole: bool
) -> jax.Array:
    """Positions of the selected tokens, int32 (K,), ascending; L at prediction slots not in use.

    Units are taken in random order. The last one is cut so that exactly `count` tokens are selected; with `whole`,
    units that no longer fit are skipped instead, and a row may fall short (see `_whole_units`).

    Args:
      order_L: random uint32.
    """
    index_L = _shuffled(units.start_L, order_L, maskable_L)
    if whole:
        offset_L = index_L - units.start_L[index_L]
        selected_L = _whole_units(units.length_L[index_L], offset_L, maskable_L[index_L], count)
    else:  # the tokens that come first, so that only K have to be sorted
        index_L = index_L[:K]
        selected_L = jnp.arange(K, dtype=jnp.int32) < count
    return jax.lax.sort(jnp.where(selected_L, index_L, maskable_L.size))[:K]


def replace(
    tokens_L: jax.Array, positions_K: jax.Array, u_K: jax.Array, random_K: jax.Array, vocab: Vocabulary, rates: Rates
) -> jax.Array:
    """Model inputs, int32 (L,): selected tokens shown as [MASK], as a uniformly random ordinary token, or unchanged
    (BERT, arXiv:1810.04805, section 3.1: 80%, 10%, 10%).

    Args:
      positions_K: int32 positions of the selected tokens; L at prediction slots not in use.
      u_K: random float32 in [0, 1) that decides between the three.
      random_K: random uint32 that chooses the random token.
    """
    drawn_K = vocab.ordinary_ids[random_K % vocab.ordinary_ids.size]
    shown_K = jnp.where(u_K < rates.mask_replace_prob + rates.random_replace_prob, drawn_K, tokens_L[positions_K])
    shown_K = jnp.where(u_K < rates.mask_replace_prob, vocab.mask_id, shown_K)
    return tokens_L.at[positions_K].set(shown_K, mode="drop")


def _uniform(bits: jax.Array) -> jax.Array:
    """Random uint32 -> float32 in [0, 1)."""
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def _word_starts(tokens_L: jax.Array, vocab: Vocabulary) -> tuple[jax.Array, jax.Array]:
    """First tokens of words, bool (L,), and among them special tokens and the tokens after those, where spans break."""
    special_L = vocab.is_special[tokens_L]
    edges_L = special_L | jnp.roll(special_L, 1).at[0].set(True)
    return vocab.starts_word[tokens_L] | jnp.roll(vocab.ends_word[tokens_L], 1) | edges_L, edges_L


def _units(starts_L: jax.Array) -> Units:
    """Units that run from one start to the next."""
    index_L = jnp.arange(starts_L.size, dtype=jnp.int32)
    start_L = jax.lax.cummax(jnp.where(starts_L, index_L, 0))
    next_start_L = jax.lax.cummin(jnp.where(starts_L, index_L, starts_L.size), reverse=True)
    end_L = jnp.roll(next_start_L, -1).at[-1].set(starts_L.size)
    return Units(start_L, end_L - start_L)


def _shuffled(start_L: jax.Array, order_L: jax.Array, maskable_L: jax.Array) -> jax.Array:
    """Token indices, int32 (L,): units in random order, the tokens of a unit in order, special tokens last.

    A unit's random number and a token's index are the upper and the lower bits of one uint32, and these are sorted.
    """
    # perf(xla-cpu): numbers are sorted faster than pairs.
    index_bits = (start_L.size - 1).bit_length()
    unit_order_L = jnp.where(maskable_L, order_L[start_L] >> 1, jnp.uint32(0xFFFFFFFF))
    index_L = jnp.arange(start_L.size, dtype=jnp.uint32)
    sorted_L = jax.lax.sort((unit_order_L >> index_bits << index_bits) | index_L)
    return (sorted_L & ((1 << index_bits) - 1)).astype(jnp.int32)


def _whole_units(length_L: jax.Array, offset_L: jax.Array, maskable_L: jax.Array, count: jax.Array) -> jax.Array:
    """Selected tokens, bool (L,): whole units in the given order, skipping those that no longer fit into `count`.

    A pass drops the units longer than what is left of `count`, and selects the others up to the first that exceeds it.
    Skipping exactly would take a pass per unit. After `_WORD_PASSES`, the last over units of one token, a row falls
    short if too few of these were left.

    Args:
      length_L: length of each token's unit; tokens are sorted by unit.
      offset_L: index of each token inside its unit.
    """
    selected_L = jnp.zeros_like(maskable_L)
    for is_last in [False] * (_WORD_PASSES - 1) + [True]:
        left = count - selected_L.sum(dtype=jnp.int32)
        longest = jnp.minimum(left, 1) if is_last else left
        fits_L = maskable_L & ~selected_L & (length_L <= longest)
        through_unit_L = jnp.cumsum(fits_L.astype(jnp.int32)) + length_L - 1 - offset_L
        selected_L |= fits_L & (through_unit_L <= left)
    return selected_L
