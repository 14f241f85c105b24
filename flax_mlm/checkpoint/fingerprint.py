"""Fingerprints of arrays, computed on the devices: what is saved is what is read back, bit for bit.

A flipped bit in a stored array is loaded without a word: its chunks carry no checksum. So every leaf gets two
sums modulo 2**32 over its elements u (as unsigned integers) and their places i in the whole array:

    sum u * (mix(i) | 1)        an odd multiplier: any change of a single element changes it
    sum mix(u ^ mix(i ^ 2**31)) what cancels in the first will not in the second

Integer sums do not depend on their order: the same array has the same fingerprint on any number of devices.
They guard against accidents, not against a forger.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fingerprint_tree(tree: Any) -> dict[str, jax.Array]:
    """Leaf name -> uint32 (3,): the two sums, and how many elements are not finite."""
    with jax.numpy_dtype_promotion("strict"), jax.named_scope("fingerprint"):
        return {name: _leaf(x) for name, x in leaves(tree).items()}


def one(tree: Any) -> jax.Array:
    """A single uint32 of the whole tree, for the log."""
    return jnp.stack([parts[0] for parts in fingerprint_tree(tree).values()]).sum(dtype=jnp.uint32)


def leaves(tree: Any) -> dict[str, Any]:
    """Leaves by name, such as `params/encoder/layers/qkv/kernel`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in paths}


def table(tree: Any, fingerprints: dict[str, Any]) -> dict[str, list[Any]]:
    """What is stored beside the arrays: leaf name -> dtype, shape, fingerprint in hexadecimal."""
    return {
        name: [str(x.dtype), list(x.shape), "".join(f"{int(part):08x}" for part in np.asarray(fingerprints[name])[:2])]
        for name, x in leaves(tree).items()
    }


def _leaf(x: jax.Array) -> jax.Array:
    finite = jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.ones_like(x, bool)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    u = (x if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)).astype(jnp.uint32)
    place = jnp.zeros_like(u)
    for axis, stride in enumerate(np.cumprod([1, *x.shape[:0:-1]])[::-1] if x.ndim else ()):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding) * jnp.uint32(
            stride % 2**32
        )
    first = (u * (_mix(place) | jnp.uint32(1))).sum(dtype=jnp.uint32)
    second = _mix(u ^ _mix(place ^ jnp.uint32(2**31))).sum(dtype=jnp.uint32)
    return jnp.stack([first, second, (~finite).sum(dtype=jnp.uint32)])


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: every bit of x moves every bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
