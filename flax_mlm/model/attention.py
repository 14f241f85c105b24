"""Self-attention that stays inside segments: masks, rotary positions, the plain implementation, and which to take."""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from flax_mlm.config.schema import Config, MeshConfig
from flax_mlm.distributed.mesh import batch_spec, make_mesh, per_row_and_head
from flax_mlm.errors import UserError
from flax_mlm.model.elementwise import max_last_axis

_LONG = {"tpu": 512, "gpu": 128}  # tokens from which on the (L, L) scores cost more than the kernel
SAVED = "attention"  # what a kernel keeps for the backward pass has this name, for policies of recomputation

DropProbabilities = Callable[[jax.Array], jax.Array] | None  # None: there is no dropout
# kind of layer (index into the windows), q, k, v (B, L, H, d), drop -> (B, L, H, d)
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, DropProbabilities], jax.Array]


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
    if name != "auto" or config.data.seq_len < _LONG.get(platform, math.inf) or config.train.reproducible:
        return "plain" if name == "auto" else name
    if platform == "gpu":
        fits = config.model.dtype == "bfloat16" and config.model.attention_dropout_rate == 0.0
        works = cudnn_works or _cudnn_works
        return "cudnn" if fits and works(config.model.hidden_size // config.model.num_heads) else "plain"
    return "splash"


@functools.cache
def _cudnn_works(width: int) -> bool:
    """Whether cuDNN is here, new enough for heads of this width, and computes what plain attention does: it depends on
    the GPU, and on which cuDNN is installed. Says why not."""

    def gradients(implementation: Callable[..., Attend]) -> jax.Array:
        segment_ids_BL = jax.reshard(jnp.broadcast_to(jnp.arange(128) // 48, (2, 128)), batch_spec(None))
        qkv = jax.random.normal(jax.random.key(0), (3, 2, 128, 2, width), jnp.bfloat16)
        attend = implementation(segment_ids_BL, False, [None])

        def loss(qkv: jax.Array) -> jax.Array:
            q, k, v = (jax.reshard(x_BLHd, batch_spec(None, "H", None)) for x_BLHd in qkv)
            return jnp.square(attend(jnp.int32(0), q, k, v, None).astype(jnp.float32)).mean()

        return jax.jit(jax.grad(loss))(qkv)

    try:
        with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.local_devices()[:1])):
            expected, found = gradients(plain), gradients(cudnn)
        error = jnp.abs(found - expected).max() / jnp.abs(expected).max()
        if error <= 0.05:
            return True
        reason = f"its gradients are wrong by {float(error):.0%}"
    except Exception as e:  # of whatever kind: missing, too old, a shape that it does not know
        reason = (str(e) or type(e).__name__).splitlines()[0]
    print(f"model.attention: plain, for cuDNN's cannot be taken: {reason}", file=sys.stderr, flush=True)
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


def attention_mask(
    queries: jax.Array, keys: jax.Array, causal: bool, window: int | None = None, first_key: int = 0
) -> jax.Array:
    """Which keys each query may see.

    Args:
      queries, keys: segment ids, int32 (..., L) and (..., M); 0 at padding, so that padding sees only padding and no
        row of the mask is empty.
      causal: a query sees itself and what comes before it.
      window: when given, a query sees keys at most `window // 2` away (ModernBERT's local layers,
        arXiv:2412.13663 §2.1.2).
      first_key: place of the first key, counted from the first query.

    Returns:
      bool (..., 1, L, M).
    """
    distance_LM = jnp.arange(queries.shape[-1])[:, None] - (jnp.arange(keys.shape[-1]) + first_key)[None, :]
    allowed_LM = jnp.ones(distance_LM.shape, bool)
    if causal:
        allowed_LM &= distance_LM >= 0
    if window is not None:
        allowed_LM &= jnp.abs(distance_LM) <= window // 2
    same = queries[..., :, None] == keys[..., None, :]
    return (same & jnp.broadcast_to(allowed_LM, same.shape))[..., None, :, :]


def rotary_table(positions_BL: jax.Array, head_width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of rotary embeddings (arXiv:2104.09864), float32 (B, L, 1, head_width / 2)."""
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = (positions_BL.astype(jnp.float32)[..., None] * frequencies[None, None])[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLHd: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (x[i], x[i + d/2]) by its position's angle; computed in float32, returned as x's dtype."""
    cos, sin = table
    wide = x_BLHd.astype(jnp.float32)
    a, b = jnp.split(wide, 2, axis=-1)
    # A sum, not two halves put together, which XLA:CPU would leave to one core: 3% of a step of 4 layers of 256.
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return (wide * cos + jnp.concatenate([b, a], axis=-1) * sin).astype(x_BLHd.dtype)


def plain(segment_ids_BL: jax.Array, causal: bool, windows: Sequence[int | None]) -> Attend:
    """softmax(q·k / sqrt(d)) · v, softmax in float32.

    Args:
      segment_ids_BL: int32; see `attention_mask`.
      windows: of each kind of layer; None: all keys of the segment.
    """
    masks = _masks(segment_ids_BL, causal, windows)

    def attend(
        kind: jax.Array, q_BLHd: jax.Array, k_BLHd: jax.Array, v_BLHd: jax.Array, drop: DropProbabilities
    ) -> jax.Array:
        def masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
            *rows, length, heads, _ = q.shape
            kept = drop(jnp.ones((*rows, heads, length, k.shape[-3]), q.dtype)) if drop else None
            return _softmax_attention(q, k, v, mask, kept)

        return _by_kind(masked, q_BLHd, k_BLHd, v_BLHd, masks, kind)

    return attend


@jax.custom_vjp
def _softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, kept: jax.Array | None) -> jax.Array:
    """The attention of `plain`, its softmax divided after the product with v and not before.

    Derived by JAX, it would go over arrays (L, M) in three more passes: on two CPU cores, of a step of 4 layers of 256,
    2% at 128 tokens and 6% at 512.

    Args:
      q, k, v: (..., L, H, d), (..., M, H, d), (..., M, H, d).
      mask: bool (..., 1, L, M).
      kept: factors of dropout (..., H, L, M).
    """
    return _softmax_attention_forward(q, k, v, mask, kept)[0]


def _softmax_attention_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, kept: jax.Array | None
) -> tuple[jax.Array, tuple]:
    scores = jnp.einsum("...LHd,...MHd->...HLM", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - max_last_axis(scores)[..., None])
    inverse_sum = _queries_first(1.0 / weights.sum(-1, keepdims=True))
    weights = weights.astype(v.dtype)
    y = _queries_first(jnp.einsum("...HLM,...MHd->...HLd", _times(weights, kept), v))
    y = (y.astype(jnp.float32) * inverse_sum).astype(v.dtype)
    return y, (q, k, v, kept, weights, inverse_sum, y)


def _softmax_attention_backward(residuals: tuple, g: jax.Array) -> tuple:
    q, k, v, kept, weights, inverse_sum, y = residuals
    g = (g.astype(jnp.float32) * inverse_sum).astype(g.dtype)
    gv = jnp.einsum("...HLM,...LHd->...MHd", _times(weights, kept), g)
    # Barrier: else the TPU compiler makes this part of the matmuls that follow, each of which computes it anew: 3.5% of
    # a step's cycles of BERT-base at 128 tokens on v5e; and with 8 rows a v6e chip its estimate of what that costs
    # overflows its stack.
    gweights = jax.lax.optimization_barrier(jnp.einsum("...LHd,...MHd->...HLM", g, v))
    # The sum of weights times their gradients, taken where it is smaller (arXiv:2205.14135, appendix B.2).
    mean = _queries_first((g.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True))
    gscores = weights.astype(jnp.float32) * (_times(gweights, kept).astype(jnp.float32) - mean) * q.shape[-1] ** -0.5
    gscores = gscores.astype(q.dtype)
    gq = _queries_first(jnp.einsum("...HLM,...MHd->...HLd", gscores, k))
    return gq, jnp.einsum("...HLM,...LHd->...MHd", gscores, q), gv, None, None


_softmax_attention.defvjp(_softmax_attention_forward, _softmax_attention_backward)


def _queries_first(x: jax.Array) -> jax.Array:
    """(..., H, L, d) -> (..., L, H, d), or back."""
    return jnp.swapaxes(x, -3, -2)


def _times(x: jax.Array, factors: jax.Array | None) -> jax.Array:
    return x if factors is None else x * factors


def cudnn(
    segment_ids_BL: jax.Array,
    causal: bool,
    windows: Sequence[int | None],
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Attend:
    """As `plain`, but without dropout: flash attention (arXiv:2205.14135) of cuDNN, in bfloat16.

    It knows neither segments nor windows on both sides, so masks are made and handed over, one for all heads.

    Args:
      implementation: xla computes the same on any device.
    """
    masks = _masks(segment_ids_BL, causal, windows)

    def masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        rows_q, rows_k, rows_v, rows_mask = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v, mask))  # a block is a row
        y = jax.nn.dot_product_attention(rows_q, rows_k, rows_v, mask=rows_mask, implementation=implementation)
        return y.reshape(q.shape)

    def attend(
        kind: jax.Array, q_BLHd: jax.Array, k_BLHd: jax.Array, v_BLHd: jax.Array, drop: DropProbabilities
    ) -> jax.Array:
        local = functools.partial(_by_kind, masked)
        return per_row_and_head(local, (q_BLHd, k_BLHd, v_BLHd), masks, kind)

    return attend


def _masks(segment_ids_BL: jax.Array, causal: bool, windows: Sequence[int | None]) -> list[jax.Array]:
    """Of each kind of layer: bool (B, 1, L, L); or, where a window is at most an eighth of the row, of queries in
    blocks as wide as the window, each with twice as many keys around it: (B, blocks, 1, 2 half, 4 half)."""
    length = segment_ids_BL.shape[1]

    def mask(window: int | None) -> jax.Array:
        half = window // 2 if window else 0
        if not half or 16 * half > length or length % (2 * half):
            return attention_mask(segment_ids_BL, segment_ids_BL, causal, window)
        queries, keys = _blocks(segment_ids_BL, half), _keys_of_blocks(segment_ids_BL, half, -1)
        return attention_mask(queries, keys, causal, window, -half)

    return [mask(window) for window in windows]


def _by_kind(
    masked: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, masks: Sequence[jax.Array], kind: Any
) -> jax.Array:
    """Attention (B, L, H, d) under the mask of a kind of layer.

    Args:
      masked: (q (..., L, H, d), k, v (..., M, H, d), mask (..., 1, L, M)) -> (..., L, H, d).
      masks: of `_masks`.
    """

    def under(mask: jax.Array) -> jax.Array:
        if mask.ndim == q.ndim:
            return masked(q, k, v, mask)
        half = mask.shape[-2] // 2
        return masked(_blocks(q, half), _keys_of_blocks(k, half), _keys_of_blocks(v, half), mask).reshape(q.shape)

    if all(mask.ndim == q.ndim for mask in masks):
        return under(jax.lax.select_n(kind, *masks))
    return jax.lax.switch(kind, [functools.partial(under, mask) for mask in masks])


def _blocks(x: jax.Array, half: int) -> jax.Array:
    """(B, L, ...) -> (B, N, 2 half, ...)."""
    return x.reshape(x.shape[0], -1, 2 * half, *x.shape[2:])


def _keys_of_blocks(x: jax.Array, half: int, filler: int = 0) -> jax.Array:
    """(B, L, ...) -> (B, N, 4 half, ...): each of `_blocks` with half a block before and after it."""
    around = [(0, 0)] * x.ndim
    around[1] = (half, half)
    blocks = _blocks(jnp.pad(x, around, constant_values=filler), half)
    return jnp.concatenate([blocks[:, :-1], blocks[:, 1:]], axis=2)
