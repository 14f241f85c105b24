"""Projections: a matmul with weights, with a derivative of its own where nothing is split."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

SAVED = "projection"  # the name of a result, for policies of recomputation


def project(
    equation: str, x: jax.Array, kernel: jax.Array, spec: PartitionSpec, dtype: DTypeLike | None = None
) -> jax.Array:
    """jnp.einsum(equation, x, kernel), of this sharding, accumulated and returned as `dtype`.

    Args:
      equation: x has rows and positions first, and so has the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    multiply = _einsum if mesh.size > 1 and not mesh.manual_axes else _unsplit
    return checkpoint_name(multiply(equation, x, kernel, spec, dtype), SAVED)


def _einsum(equation: str, x: jax.Array, kernel: jax.Array, spec: PartitionSpec, dtype: DTypeLike | None) -> jax.Array:
    return jnp.einsum(equation, x, kernel, out_sharding=spec, preferred_element_type=dtype)


_unsplit = jax.custom_vjp(_einsum, nondiff_argnums=(0, 3, 4))


def _forward(equation: str, x: jax.Array, kernel: jax.Array, *args: Any) -> tuple[jax.Array, tuple]:
    return _unsplit(equation, x, kernel, *args), (x, kernel)


def _backward(equation: str, spec: PartitionSpec, dtype: DTypeLike | None, kept: tuple, g: jax.Array) -> tuple:
    """The gradient of the kernel as a product of matrices, which XLA:CPU multiplies as they lie. With more dimensions
    it would transpose one first, and compute what that came from anew, column by column: a fifth of a step of 4 layers
    of 256."""
    (x, kernel), g = kept, g.astype(kept[0].dtype)
    inputs, of_y = equation.split("->")
    of_x, of_kernel = inputs.split(",")
    gx = jnp.einsum(f"{of_y},{of_kernel}->{of_x}", g, kernel, out_sharding=jax.typeof(x).sharding)
    rows, whole = x.shape[0] * x.shape[1], PartitionSpec(None, None)
    pair = (x, g) if of_kernel[0] in of_x else (g, x)
    a, b = (jax.lax.reshape(matrix, (rows, matrix.size // rows), out_sharding=whole) for matrix in pair)
    gkernel = jnp.einsum("RM,RN->MN", a, b, out_sharding=whole)
    return gx, jax.lax.reshape(gkernel, kernel.shape, out_sharding=jax.typeof(kernel).sharding)


_unsplit.defvjp(_forward, _backward)
