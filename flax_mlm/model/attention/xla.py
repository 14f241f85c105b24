"""Attention with a mask in memory, any mask: as XLA compiles it, on any device and with dropout; and by cuDNN, on GPUs
in bfloat16, where XLA calls its flash attention (arXiv:2205.14135)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_mlm.distributed.mesh import per_row_and_head
from flax_mlm.model.attention.masks import layer_mask, split_blocks
from flax_mlm.model.attention.types import Attend, Drop, switch_layer_type
from flax_mlm.model.elementwise import max_last_axis


def xla(segment_ids_BL: jax.Array, causal: bool, windows: Sequence[int | None]) -> Attend:
    """Builds softmax(q·k / sqrt(d)) · v, the softmax in float32. Arguments: see `attention_mask`."""
    return switch_layer_type(lambda window: _attend_within(layer_mask(segment_ids_BL, causal, window)), windows)


def _attend_within(mask: jax.Array) -> Callable[..., jax.Array]:
    def attend(q_BLHd: jax.Array, k_BLHd: jax.Array, v_BLHd: jax.Array, drop: Drop | None) -> jax.Array:
        q, k, v = split_blocks(q_BLHd, k_BLHd, v_BLHd, mask)
        *rows, length, heads, _ = q.shape
        factors = drop(jnp.ones((*rows, heads, length, k.shape[-3]), q.dtype)) if drop else None
        return _softmax_attention(q, k, v, mask, factors).reshape(q_BLHd.shape)

    return attend


@jax.custom_vjp
def _softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, factors: Any) -> jax.Array:
    """Computes softmax attention, dividing by the softmax's sum after the product with v.

    perf(xla-cpu): the derivative that JAX finds goes over arrays (L, M) three more times.

    Args:
      q: (..., L, H, d).
      k, v: (..., M, H, d).
      mask: bool (..., 1, L, M).
      factors: (..., H, L, M), what dropout multiplies the probabilities by; None: no dropout.
    """
    return _softmax_attention_forward(q, k, v, mask, factors)[0]


def _softmax_attention_forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, factors: Any) -> tuple:
    logits = jnp.einsum("...LHd,...MHd->...HLM", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - max_last_axis(logits)[..., None])
    inverse_sum = _queries_first(1.0 / weights.sum(-1, keepdims=True))
    weights = weights.astype(v.dtype)
    y = _queries_first(jnp.einsum("...HLM,...MHd->...HLd", _apply_dropout(weights, factors), v))
    y = (y.astype(jnp.float32) * inverse_sum).astype(v.dtype)
    return y, (q, k, v, factors, weights, inverse_sum, y)


def _softmax_attention_backward(residuals: tuple, g: jax.Array) -> tuple:
    q, k, v, factors, weights, inverse_sum, y = residuals
    g = (g.astype(jnp.float32) * inverse_sum).astype(g.dtype)
    grad_v = jnp.einsum("...HLM,...LHd->...MHd", _apply_dropout(weights, factors), g)
    # perf(xla-tpu): without the barrier both matmuls below would compute this one inside themselves.
    grad_weights = jax.lax.optimization_barrier(jnp.einsum("...LHd,...MHd->...HLM", g, v))
    # The sum of weights × gradients, taken where it is smaller (arXiv:2205.14135, appendix B.2).
    mean = _queries_first((g.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True))
    grad_logits = _apply_dropout(grad_weights, factors).astype(jnp.float32) - mean
    grad_logits = (weights.astype(jnp.float32) * grad_logits * q.shape[-1] ** -0.5).astype(q.dtype)
    grad_q = _queries_first(jnp.einsum("...HLM,...MHd->...HLd", grad_logits, k))
    grad_k = jnp.einsum("...HLM,...LHd->...MHd", grad_logits, q)
    return grad_q, grad_k, grad_v, None, None


_softmax_attention.defvjp(_softmax_attention_forward, _softmax_attention_backward)


def _queries_first(x: jax.Array) -> jax.Array:
    """(..., H, L, d) -> (..., L, H, d), or back."""
    return jnp.swapaxes(x, -3, -2)


def _apply_dropout(x: jax.Array, factors: jax.Array | None) -> jax.Array:
    return x if factors is None else x * factors


def cudnn(
    segment_ids_BL: jax.Array, causal: bool, windows: Sequence[int | None], implementation: Any = "cudnn"
) -> Attend:
    """Builds attention as `xla` does, without dropout.

    cuDNN knows neither segments nor two-sided windows, so it gets masks, one for all heads.

    Args:
      implementation: "cudnn" or "xla"; "xla" computes the same on any device.
    """

    def attend_on_device(q_BLHd: jax.Array, k_BLHd: jax.Array, v_BLHd: jax.Array, mask: jax.Array) -> jax.Array:
        arrays = (*split_blocks(q_BLHd, k_BLHd, v_BLHd, mask), mask)
        q, k, v, mask = (x.reshape(-1, *x.shape[-3:]) for x in arrays)  # cuDNN takes a block as a row
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation).reshape(q_BLHd.shape)

    def attend_within(window: int | None) -> Callable[..., jax.Array]:
        mask = layer_mask(segment_ids_BL, causal, window)
        return lambda *qkv_BLHd, drop: per_row_and_head(attend_on_device, qkv_BLHd, mask)

    return switch_layer_type(attend_within, windows)
