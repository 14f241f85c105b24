"""Token tables of a vocabulary, as device arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mlm.data.tokenizer.base import Tokenizer


class Vocabulary(NamedTuple):
    """Properties of the V tokens that masking and segmentation read on the device."""

    is_special: jax.Array  # (V,) bool; special tokens are never predicted and never drawn as a random token
    starts_word: jax.Array  # (V,) bool; special tokens do
    ordinary_ids: jax.Array  # (R,) int32, the ids that are not special
    pad_id: int
    cls_id: int
    mask_id: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "Vocabulary":
        """Copies the tables of a tokenizer to the device."""
        return cls(
            is_special=jnp.asarray(tokenizer.is_special),
            starts_word=jnp.asarray(tokenizer.starts_word),
            ordinary_ids=jnp.asarray(np.flatnonzero(~tokenizer.is_special), jnp.int32),
            pad_id=int(tokenizer.pad_id),
            cls_id=int(tokenizer.cls_id),
            mask_id=int(tokenizer.mask_id),
        )
