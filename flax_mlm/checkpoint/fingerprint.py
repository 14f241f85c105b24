"""Fingerprints of arrays, computed on the devices: an array that is read back is compared, bit for bit, with the saved.

Chunks of a stored array carry no checksum, so a flipped bit would be loaded unnoticed. Every leaf gets two sums modulo
2**32 over its elements u (as unsigned integers) and their indices i in the whole array:

    sum u * (mix(i) | 1)        an odd multiplier: any change of a single element changes it
    sum mix(u ^ mix(i ^ 2**31)) changes that cancel in the first sum do not cancel in the second

Integer sums do not depend on their order: the same array has the same fingerprint on any number of devices.
They guard against accidents, not against a forger.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fingerprint_tree(tree: Any) -> dict[str, jax.Array]:
    """Returns leaf name -> uint32 (3,): the two sums, and the number of elements that are not finite."""
    with jax.numpy_dtype_promotion("strict"), jax.named_scope("fingerprint"):
        # Traced once for all leaves of a shape.
        return {name: jax.jit(_fingerprint)(x) for name, x in leaves(tree).items()}


fingerprints = jax.jit(fingerprint_tree)


def fingerprint_scalar(tree: Any) -> jax.Array:
    """Returns a single uint32 for a whole tree, for the log."""
    return jnp.stack([sums[0] for sums in fingerprint_tree(tree).values()]).sum(dtype=jnp.uint32)


def leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by name, such as `params/encoder/layers/qkv/kernel`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in paths}


def table(tree: Any, sums: dict[str, Any]) -> dict[str, list[Any]]:
    """Returns the entries of `meta`, leaf name -> dtype, shape, fingerprint in hexadecimal; `sums` is that of
    `fingerprint_tree`."""
    digits = {name: "".join(f"{int(s):08x}" for s in x[:2]) for name, x in sums.items()}
    return {name: [str(x.dtype), list(x.shape), digits[name]] for name, x in leaves(tree).items()}


def _fingerprint(x: jax.Array) -> jax.Array:
    finite = jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.ones_like(x, bool)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    u = (x if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)).astype(jnp.uint32)
    index = jnp.zeros_like(u)
    strides = np.cumprod([1, *x.shape[:0:-1]])[::-1] if x.ndim else ()
    for axis, stride in enumerate(strides):
        along_axis = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding)
        index += along_axis * jnp.uint32(stride % 2**32)
    first = (u * (_mix(index) | jnp.uint32(1))).sum(dtype=jnp.uint32)
    second = _mix(u ^ _mix(index ^ jnp.uint32(2**31))).sum(dtype=jnp.uint32)
    return jnp.stack([first, second, (~finite).sum(dtype=jnp.uint32)])


def _mix(x: jax.Array) -> jax.Array:
    """Applies the finaliser of MurmurHash3: every bit of x affects every bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
