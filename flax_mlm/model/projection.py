"""Projections: a matmul by weights, with a derivative of its own where nothing is sharded."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

SAVED = "projection"  # checkpoint_name of a projection's result, for recomputation policies


def project(equation: str, x: jax.Array, kernel: jax.Array, spec: PartitionSpec, dtype: Any = None) -> jax.Array:
    """Computes jnp.einsum(equation, x, kernel).

    Args:
      equation: x and the result begin with the same two letters, rows and positions.
      spec: Sharding of the result.
      dtype: Dtype of accumulation and result; None: einsum's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    einsum = _einsum if mesh.size > 1 and not mesh.manual_axes else _unsharded_einsum
    return checkpoint_name(einsum(equation, x, kernel, spec, dtype), SAVED)


def _einsum(equation: str, x: jax.Array, kernel: jax.Array, spec: PartitionSpec, dtype: Any) -> jax.Array:
    return jnp.einsum(equation, x, kernel, out_sharding=spec, preferred_element_type=dtype)


_unsharded_einsum = jax.custom_vjp(_einsum, nondiff_argnums=(0, 3, 4))


def _forward(equation: str, x: jax.Array, kernel: jax.Array, *args: Any) -> tuple[jax.Array, tuple]:
    return _unsharded_einsum(equation, x, kernel, *args), (x, kernel)


def _backward(equation: str, spec: PartitionSpec, dtype: Any, residuals: tuple, g: jax.Array) -> tuple:
    """Computes the kernel's gradient as one product of two matrices.

    perf(xla-cpu): matrices are multiplied as they lie in memory; with more dimensions XLA would transpose one first,
    and compute its producer again for every column.
    """
    x, kernel = residuals
    g = g.astype(x.dtype)
    inputs, y_dims = equation.split("->")
    x_dims, kernel_dims = inputs.split(",")
    grad_x = jnp.einsum(f"{y_dims},{kernel_dims}->{x_dims}", g, kernel, out_sharding=jax.typeof(x).sharding)
    rows, whole = x.shape[0] * x.shape[1], PartitionSpec(None, None)
    factors = (x, g) if kernel_dims[0] in x_dims else (g, x)
    a, b = (jax.lax.reshape(factor, (rows, factor.size // rows), out_sharding=whole) for factor in factors)
    grad_kernel = jnp.einsum("RM,RN->MN", a, b, out_sharding=whole)
    return grad_x, jax.lax.reshape(grad_kernel, kernel.shape, out_sharding=jax.typeof(kernel).sharding)


_unsharded_einsum.defvjp(_forward, _backward)
