"""GELU, GeGLU, LayerNorm and a bias, with derivatives that recompute instead of keeping float32 intermediates; and a
maximum that XLA:CPU computes fast.

The derivatives that JAX finds keep the float32 intermediates for the backward pass. Those here keep the input, which
some matmul has as its result anyway.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flax_mlm.distributed.mesh import reshard_like


def sum_rows(x: jax.Array, vector: jax.Array) -> jax.Array:
    """Sums x (B, L, ...) over B and L in float32; returns it in the dtype and sharding of `vector` (...).

    This is the gradient of a vector that is broadcast to (B, L, ...).
    """
    # perf(xla-cpu): the barrier keeps it two sums, first over L; one sum over both is slower.
    total = jax.lax.optimization_barrier(x.astype(jnp.float32).sum(1)).sum(0).astype(vector.dtype)
    return reshard_like(total, vector)


@jax.custom_vjp
def add_bias(x: jax.Array, vector: jax.Array) -> jax.Array:
    """Computes x (B, L, ...) + vector (...)."""
    return x + vector[None, None]


add_bias.defvjp(lambda x, vector: (x + vector[None, None], vector), lambda vector, g: (g, sum_rows(g, vector)))


def _normal_cdf(x: jax.Array) -> jax.Array:
    # perf(xla-cpu): erf; the erfc of jax.nn.gelu(approximate=False) is three times slower.
    return 0.5 * (1.0 + jax.lax.erf(x * 2**-0.5))


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Computes the exact GELU, x Φ(x) (arXiv:1606.08415), in float32; returns x's dtype."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_slope(x: jax.Array) -> jax.Array:
    return _normal_cdf(x) + x * jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5


def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return ((g.astype(jnp.float32) * _gelu_slope(x.astype(jnp.float32))).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.checkpoint
def gelu_tanh(x: jax.Array) -> jax.Array:
    """Computes GELU's approximation by tanh (arXiv:1606.08415 §2) in float32; returns x's dtype."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"gelu": gelu, "gelu_tanh": gelu_tanh}


@jax.custom_vjp
def geglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Computes GELU(gate) × up (arXiv:2002.05202) in float32; returns the inputs' dtype."""
    wide = gate.astype(jnp.float32)
    return (wide * _normal_cdf(wide) * up.astype(jnp.float32)).astype(gate.dtype)


def _geglu_backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up, g = (x.astype(jnp.float32) for x in (*residuals, g))
    grad_gate = g * up * _gelu_slope(gate)
    grad_up = g * gate * _normal_cdf(gate)
    return grad_gate.astype(residuals[0].dtype), grad_up.astype(residuals[1].dtype)


geglu.defvjp(lambda gate, up: (geglu(gate, up), (gate, up)), _geglu_backward)


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """Normalises x (B, L, D) over D (arXiv:1607.06450), in float32; returns x's dtype."""
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> tuple[jax.Array, tuple]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    inverse_deviation = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + eps)
    y = (wide - mean) * inverse_deviation * scale[None, None]
    return (y if bias is None else y + bias[None, None]).astype(x.dtype), (x, mean, inverse_deviation, scale, bias)


def _layer_norm_backward(residuals: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None, None]:
    x, mean, inverse_deviation, scale, bias = residuals
    normalised = (x.astype(jnp.float32) - mean) * inverse_deviation
    g = g.astype(jnp.float32)
    grad_x = g * scale[None, None]
    projected = normalised * (grad_x * normalised).mean(-1, keepdims=True)
    grad_x = inverse_deviation * (grad_x - grad_x.mean(-1, keepdims=True) - projected)
    grad_bias = None if bias is None else sum_rows(g, bias)
    return grad_x.astype(x.dtype), sum_rows(g * normalised, scale), grad_bias, None


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def max_last_axis(x: jax.Array) -> jax.Array:
    """Computes the maximum over the last axis, without a derivative."""
    x = jax.lax.stop_gradient(x)
    if jax.typeof(x).sharding.spec[-1] is not None:
        return x.max(-1)
    return jax.lax.platform_dependent(x, cpu=_max_by_halves, default=lambda x: x.max(-1))


def _max_by_halves(x: jax.Array) -> jax.Array:
    # perf(xla-cpu): max over an axis is slow; the elementwise maximum of two arrays runs at the speed of memory.
    while x.shape[-1] > 32:
        half = -(-x.shape[-1] // 2)
        x = jnp.maximum(x[..., :half], x[..., -half:])
    return x.max(-1)
