"""Self-attention that stays inside segments: masks, rotary positions, the plain implementation, and which to take."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from flax_mlm import sharding
from flax_mlm.config import Config
from flax_mlm.errors import UserError
from flax_mlm.model.elementwise import softmax

_LONG = 512  # tokens from which on the (L, L) scores cost more than the kernel
SAVED = "attention"  # what a kernel keeps for the backward pass has this name, for policies of recomputation

Drop = Callable[[jax.Array], jax.Array]  # applied to the probabilities
# kind of layer (index into the windows), q, k, v (B, L, H, d), drop -> (B, L, H, d)
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Drop], jax.Array]


def choose(config: Config, platform: str, cudnn_works: Callable[[int], bool] | None = None) -> str:
    """What `model.attention` comes to on devices of a platform: plain, splash, cudnn or interpreted.

    Args:
      cudnn_works: says of heads of a width whether cuDNN's kernel can be taken; None: it is tried.

    Raises:
      UserError: a kernel was asked for, and these are not the devices for it.
    """
    name = config.model.attention
    for kernel, where in (("splash", "tpu"), ("cudnn", "gpu")):
        if name == kernel and platform != where:
            raise UserError(
                f"model.attention is {kernel}, which runs on {where.upper()}s; the devices here are of kind {platform}"
            )
    if name != "auto" or config.data.seq_len < _LONG or config.train.reproducible:
        return "plain" if name == "auto" else name
    if platform == "gpu":
        fits = config.model.dtype == "bfloat16" and config.model.attention_dropout_rate == 0.0
        works = cudnn_works or _cudnn_works
        return "cudnn" if fits and works(config.model.hidden_size // config.model.num_heads) else "plain"
    return "splash" if platform == "tpu" else "plain"


@functools.cache
def _cudnn_works(width: int) -> bool:
    """Whether cuDNN is here, new enough for heads of this width, and computes what plain attention does: it depends on
    the GPU, and on which cuDNN is installed."""
    q_BLHd = jax.random.normal(jax.random.key(0), (2, 128, 2, width), jnp.bfloat16)
    segment_ids_BL = jnp.broadcast_to(jnp.arange(128) // 48, (2, 128))

    def loss(q_BLHd: jax.Array, implementation: Literal["cudnn", "xla"]) -> jax.Array:
        mask = attention_mask(segment_ids_BL, causal=False)
        y_BLHd = jax.nn.dot_product_attention(q_BLHd, q_BLHd, q_BLHd, mask=mask, implementation=implementation)
        return jnp.square(y_BLHd.astype(jnp.float32)).mean()

    try:
        with jax.set_mesh(jax.make_mesh((), (), devices=jax.local_devices()[:1])):
            plain, cudnn = jax.grad(loss)(q_BLHd, "xla"), jax.grad(loss)(q_BLHd, "cudnn")
            return bool(jnp.abs(plain - cudnn).max() <= jnp.abs(plain).max() * jnp.bfloat16(0.05))
    except Exception:  # of whatever kind: missing, too old, a shape that it does not know
        return False


def implementation(name: str, length: int, drops: bool) -> Callable[[jax.Array, bool, Sequence[int | None]], Attend]:
    """What `model.attention` stands for: (segment ids, causal, windows) -> Attend. A kernel where it can be:
    probabilities without dropout, and for splash rows of a multiple of 128 tokens."""
    if name in ("plain", "auto") or drops:
        return plain
    if name == "cudnn":
        return cudnn
    if length % 128:
        return plain
    from flax_mlm.model.splash import splash  # Pallas takes a second to import

    return functools.partial(splash, interpret=name == "interpreted")


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


def plain(segment_ids_BL: jax.Array, causal: bool, windows: Sequence[int | None]) -> Attend:
    """softmax(q·k / sqrt(d)) · v, softmax in float32.

    Args:
      segment_ids_BL: int32; see `attention_mask`.
      windows: of each kind of layer; None: all keys of the segment.
    """
    masks = jnp.stack([attention_mask(segment_ids_BL, causal, window) for window in windows])

    def attend(kind: jax.Array, q_BLHd: jax.Array, k_BLHd: jax.Array, v_BLHd: jax.Array, drop: Drop) -> jax.Array:
        scores = jnp.einsum("BLHd,BMHd->BHLM", q_BLHd, k_BLHd) * jnp.asarray(q_BLHd.shape[-1] ** -0.5, q_BLHd.dtype)
        scores = jnp.where(masks[kind], scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
        probabilities = drop(softmax(scores, v_BLHd.dtype))
        return jnp.einsum("BHLM,BMHd->BLHd", probabilities, v_BLHd)

    return attend


def cudnn(
    segment_ids_BL: jax.Array,
    causal: bool,
    windows: Sequence[int | None],
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Attend:
    """As `plain`, but without dropout: flash attention (arXiv:2205.14135) of cuDNN, in bfloat16.

    It knows neither segments nor windows on both sides, so masks are made and handed over: (B, 1, L, L), one for all
    heads.

    Args:
      implementation: xla computes the same on any device.
    """
    masks = jnp.stack([attention_mask(segment_ids_BL, causal, window) for window in windows])

    def attend(kind: jax.Array, q_BLHd: jax.Array, k_BLHd: jax.Array, v_BLHd: jax.Array, drop: Drop) -> jax.Array:
        def local(q_BLHd: jax.Array, k_BLHd: jax.Array, v_BLHd: jax.Array, mask_B1LL: jax.Array) -> jax.Array:
            return jax.nn.dot_product_attention(q_BLHd, k_BLHd, v_BLHd, mask=mask_B1LL, implementation=implementation)

        return sharding.per_row_and_head(local, (q_BLHd, k_BLHd, v_BLHd), masks[kind])

    return attend
