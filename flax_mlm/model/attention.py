"""Self-attention that stays inside segments: masks, rotary positions, and the plain implementation."""

import jax
import jax.numpy as jnp


def attention_mask(segment_ids_BL: jax.Array, causal: bool, window: int | None = None) -> jax.Array:
    """Which keys each query may see.

    Args:
      segment_ids_BL: int32; 0 at padding, so that padding sees only padding and no row of the mask is empty.
      causal: a query sees itself and what comes before it.
      window: when given, a query sees keys at most `window // 2` away (ModernBERT's local layers,
        arXiv:2412.13663 §2.1.2).

    Returns:
      bool (B, 1, L, L).
    """
    length = segment_ids_BL.shape[1]
    distance_LL = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    allowed_LL = jnp.ones((length, length), bool)
    if causal:
        allowed_LL &= distance_LL >= 0
    if window is not None:
        allowed_LL &= jnp.abs(distance_LL) <= window // 2
    same_BLL = segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]
    return (same_BLL & allowed_LL[None])[:, None]


def rotary_table(positions_BL: jax.Array, head_width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of rotary embeddings (arXiv:2104.09864), float32 (B, L, 1, head_width / 2)."""
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = (positions_BL.astype(jnp.float32)[..., None] * frequencies[None, None])[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLHd: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (x[i], x[i + d/2]) by its position's angle; computed in float32, returned as x's dtype."""
    cos, sin = table
    a, b = jnp.split(x_BLHd.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHd.dtype)


def attend(q_BLHd: jax.Array, k_BLHd: jax.Array, v_BLHd: jax.Array, mask: jax.Array, drop) -> jax.Array:
    """softmax(q·k / sqrt(d)) · v under `mask` (B, 1, L, L); softmax in float32. `drop` is applied to the
    probabilities. Returns (B, L, H, d)."""
    scores = jnp.einsum("BLHd,BMHd->BHLM", q_BLHd, k_BLHd) * jnp.asarray(q_BLHd.shape[-1] ** -0.5, q_BLHd.dtype)
    scores = jnp.where(mask, scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    probabilities = drop(jax.nn.softmax(scores, axis=-1).astype(v_BLHd.dtype))
    return jnp.einsum("BHLM,BMHd->BLHd", probabilities, v_BLHd)
