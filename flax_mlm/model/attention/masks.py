"""Attention masks: segments, causality, windows; and windows cut into blocks."""

import jax
import jax.numpy as jnp


def attention_mask(
    query_segments: jax.Array, key_segments: jax.Array, causal: bool, window: int | None = None, first_key: int = 0
) -> jax.Array:
    """Marks the keys that each query may attend to.

    Args:
      query_segments: int32 (..., L), segment ids; 0 at padding. Padding attends to padding, so no mask row is empty.
      key_segments: int32 (..., M).
      causal: A query attends to itself and to earlier keys only.
      window: If given, a query attends to keys at most `window // 2` away (ModernBERT's local layers,
        arXiv:2412.13663 §2.1.2).
      first_key: Position of the first key relative to the first query.

    Returns:
      bool (..., 1, L, M).
    """
    query_positions = jnp.arange(query_segments.shape[-1])
    key_positions = jnp.arange(key_segments.shape[-1]) + first_key
    distance_LM = query_positions[:, None] - key_positions[None, :]
    allowed_LM = jnp.ones(distance_LM.shape, bool)
    if causal:
        allowed_LM &= distance_LM >= 0
    if window is not None:
        allowed_LM &= jnp.abs(distance_LM) <= window // 2
    same_segment = query_segments[..., :, None] == key_segments[..., None, :]
    return (same_segment & jnp.broadcast_to(allowed_LM, same_segment.shape))[..., None, :, :]


def layer_mask(segment_ids_BL: jax.Array, causal: bool, window: int | None) -> jax.Array:
    """Builds a layer's mask: over whole rows, or over blocks if the window is at most an eighth of the row.

    Returns:
      bool (B, 1, L, L); or, with w = window // 2, bool (B, L / 2w, 1, 2w, 4w): blocks of 2w queries, each with the
      4w keys around it.
    """
    length = segment_ids_BL.shape[1]
    half = window // 2 if window else 0
    if not half or 16 * half > length or length % (2 * half):
        return attention_mask(segment_ids_BL, segment_ids_BL, causal, window)
    queries, keys = _query_blocks(segment_ids_BL, half), _key_blocks(segment_ids_BL, half, -1)
    return attention_mask(queries, keys, causal, window, -half)


def split_blocks(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts q, k and v (B, L, H, d) into the blocks of a `layer_mask`: (B, N, 2w, H, d) and twice (B, N, 4w, H, d).

    A mask over whole rows leaves them as they are.
    """
    if mask.ndim == q.ndim:
        return q, k, v
    half = mask.shape[-2] // 2
    return _query_blocks(q, half), _key_blocks(k, half), _key_blocks(v, half)


def _query_blocks(x: jax.Array, half: int) -> jax.Array:
    """(B, L, ...) -> (B, N, 2 half, ...)."""
    return x.reshape(x.shape[0], -1, 2 * half, *x.shape[2:])


def _key_blocks(x: jax.Array, half: int, filler: int = 0) -> jax.Array:
    """(B, L, ...) -> (B, N, 4 half, ...): each query block with half a block before and after it."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (half, half)
    blocks = _query_blocks(jnp.pad(x, padding, constant_values=filler), half)
    return jnp.concatenate([blocks[:, :-1], blocks[:, 1:]], axis=2)
