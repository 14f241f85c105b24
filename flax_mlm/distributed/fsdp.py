"""Fully sharded parameters (ZeRO-3): each layer gathers its parameters along `fsdp` and scatters their gradients."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_mlm.distributed.mesh import BATCH


def gather_fsdp(tree: Any, dtype: Any = None) -> Any:
    """Parameters made whole along `fsdp` by an all-gather. The gradient is a reduce-scatter along `fsdp`, and then, on
    the slice that each device keeps, an all-reduce along `data`.

    Args:
      dtype: parameters are cast to it before the all-gather, so that less is communicated in both directions; None
        keeps their own dtype.
    """

    def gather(x: jax.Array) -> jax.Array:
        spec = jax.typeof(x).sharding.spec
        return _gather(x.astype(dtype or x.dtype), spec) if "fsdp" in spec else x

    # Along an axis of one device it would do nothing, but the compiler would keep it and copy for it.
    return jax.tree.map(gather, tree) if splits_parameters() else tree


def splits_parameters() -> bool:
    """True if `fsdp` has more than one device: layers then gather their parameters."""
    return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1


def save_all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """Policy of `jax.checkpoint` that saves everything but gathered parameters. The backward pass gathers and splits
    them again; saved from the forward pass they would be the whole model on every device."""
    inner = params.get("call_jaxpr")  # the body of `_gather`, a function with its own derivative
    if primitive.name in ("split", "squeeze"):
        return False
    return inner is None or all(equation.primitive.name != "reshard" for equation in inner.eqns)


def _without_fsdp(spec: PartitionSpec) -> tuple[Any, ...]:
    return tuple(None if axis == "fsdp" else axis for axis in spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.reshard(x, PartitionSpec(*_without_fsdp(spec), reduced=set(BATCH)))


def _gather_backward(spec: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    axis = spec.index("fsdp")

    def reduce(partial_sum: jax.Array) -> jax.Array:
        # perf(xla-tpu): the compiler emits a reduce-scatter only where a device's slice is contiguous in memory, tiles
        # included; otherwise it emits an all-reduce and slices the result.
        front = jnp.moveaxis(partial_sum, axis, 0)
        devices = jax.lax.axis_size("fsdp")
        slice_shape = (front.shape[0] // devices, *front.shape[1:])
        lanes = math.gcd(math.prod(slice_shape), 128)
        own = jax.lax.psum_scatter(front.reshape(devices, -1, lanes), "fsdp", scatter_dimension=0)
        return jnp.moveaxis(jax.lax.psum(own.reshape(slice_shape), "data"), 0, axis)

    unreduced = PartitionSpec(*_without_fsdp(spec), unreduced=set(BATCH))
    return (jax.shard_map(reduce, in_specs=unreduced, out_specs=spec)(gradient),)


_gather.defvjp(lambda x, spec: (_gather(x, spec), None), _gather_backward)
