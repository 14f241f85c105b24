"""Rows of tokens on the device: their random keys, the tables of their vocabulary, and the segments packed into them.

Every key follows from the run's seed, a purpose and a row's number, so a run stores no random state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mlm.config.schema import Config
from flax_mlm.data.tokenizer import Tokenizer

_PURPOSES = ("init", "mask", "dropout", "eval")


def new_key(seed: int) -> jax.Array:
    """Key of a seed: that of `jax.random.key` by default, whatever JAX's options say of generator and seeds."""
    return jax.random.wrap_key_data(jnp.array([0, seed % 2**32], jnp.uint32), impl="threefry2x32")


def run_key(config: Config, purpose: str) -> jax.Array:
    """Key of a run for one purpose: "init", "mask", "dropout" or "eval"."""
    return jax.random.fold_in(new_key(config.seed), _PURPOSES.index(purpose))


def row_keys(key: jax.Array, row_ids_B2: jax.Array) -> jax.Array:
    """Keys (B,) of rows; a row's key does not depend on the batch that the row is in.

    Args:
      row_ids_B2: uint32 [high, low] halves of each row's number in its stream.
    """
    return jax.vmap(lambda row_id_2: jax.random.fold_in(jax.random.fold_in(key, row_id_2[0]), row_id_2[1]))(row_ids_B2)


class Vocabulary(NamedTuple):
    """Properties of the V tokens that masking and segmentation read on the device."""

    is_special: jax.Array  # (V,) bool; special tokens are never predicted and never drawn as a random token
    starts_word: jax.Array  # (V,) bool; special tokens do
    ends_word: jax.Array  # (V,) bool; the token after one of them begins a word
    ordinary_ids: jax.Array  # (R,) int32, the ids that are not special
    pad_id: int
    cls_id: int
    mask_id: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "Vocabulary":
        """Copies the tables of a tokenizer to the device."""
        is_special, starts, ends = map(jnp.asarray, (tokenizer.is_special, tokenizer.starts_word, tokenizer.ends_word))
        ordinary_ids = jnp.asarray(np.flatnonzero(~tokenizer.is_special), jnp.int32)
        ids = int(tokenizer.pad_id), int(tokenizer.cls_id), int(tokenizer.mask_id)
        return cls(is_special, starts, ends, ordinary_ids, *ids)


def segment_ids(tokens_BL: jax.Array, vocab: Vocabulary) -> jax.Array:
    """Segment numbers, int32 (B, L): 1, 2, 3 ... in each row, a segment beginning at each [CLS]; 0 at [PAD]."""
    segments_BL = jnp.cumsum((tokens_BL == vocab.cls_id).astype(jnp.int32), axis=1)
    return jnp.where(tokens_BL == vocab.pad_id, 0, segments_BL)


def positions(segment_ids_BL: jax.Array) -> jax.Array:
    """Positions of tokens inside their segments, int32 (B, L), from 0."""
    is_first_BL = segment_ids_BL != jnp.roll(segment_ids_BL, 1, axis=1)
    index_1L = jnp.arange(segment_ids_BL.shape[1], dtype=jnp.int32)[None]
    return index_1L - jax.lax.cummax(jnp.where(is_first_BL, index_1L, 0), axis=1)
