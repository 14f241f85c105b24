"""Segments of packed rows: which document each token belongs to, and its position there."""

import jax
import jax.numpy as jnp
from jax import lax

from flax_mlm.objectives.vocabulary import Vocabulary


def segment_ids(tokens_BL: jax.Array, vocab: Vocabulary) -> jax.Array:
    """Segment numbers, int32 (B, L): 1, 2, 3 ... in each row, a segment beginning at each [CLS]; 0 at [PAD]."""
    segments_BL = jnp.cumsum((tokens_BL == vocab.cls_id).astype(jnp.int32), axis=1)
    return jnp.where(tokens_BL == vocab.pad_id, 0, segments_BL)


def positions(segment_ids_BL: jax.Array) -> jax.Array:
    """Positions of tokens inside their segments, int32 (B, L), from 0."""
    is_first_BL = segment_ids_BL != jnp.roll(segment_ids_BL, 1, axis=1)
    index_1L = jnp.arange(segment_ids_BL.shape[1], dtype=jnp.int32)[None]
    return index_1L - lax.cummax(jnp.where(is_first_BL, index_1L, 0), axis=1)
