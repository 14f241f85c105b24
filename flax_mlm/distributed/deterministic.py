"""Batch computations with the same bits on any number of devices.

Addition of floats is not associative, and XLA may round the same formula differently at another shape or in another
fusion. So the batch is cut into a fixed number of groups of rows; every group runs the same program at the same shape,
and the sum over groups is taken in their order. Here four groups on two devices, with gradients a and b:

    compute     device 0: a₀b₀ a₁b₁                device 1: a₂b₂ a₃b₃
    all_to_all  device 0: a₀ a₁ a₂ a₃              device 1: b₀ b₁ b₂ b₃
    add         device 0: A = ((a₀ + a₁) + a₂) + a₃   device 1: B = ((b₀ + b₁) + b₂) + b₃
    all_gather  device 0: AB                       device 1: AB
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from flax_mlm.distributed.mesh import BATCH, num_batch_shards, replicate


def sum_groups(fn: Any, groups: int, shared: Any, batch: Any) -> Any:
    """Sum of `fn(shared, group)` over the groups of the batch, whole on every device.

    Args:
      fn: returns sums over the rows of its group.
      groups: number of groups of equal size; a multiple of the devices that split the batch.
      shared: arrays that every group sees whole.
      batch: arrays (B, ...).
    """
    return _run_groups(fn, groups, shared, batch, _ordered_sum, PartitionSpec())


def map_groups(fn: Any, groups: int, shared: Any, batch: Any) -> Any:
    """`fn(shared, group)` of every group of the batch, concatenated to (B, ...) in the order of the rows; arguments as
    in `sum_groups`."""
    return _run_groups(fn, groups, shared, batch, lambda x: x.reshape(-1, *x.shape[2:]), PartitionSpec(BATCH))


def gather_whole(tree: Any) -> Any:
    """`tree` whole on every device, for elementwise code, which may round differently at another shape. The barrier
    keeps the compiler from slicing before the arithmetic."""
    return jax.lax.optimization_barrier(replicate(tree))


def _run_groups(fn: Any, groups: int, shared: Any, batch: Any, combine: Any, out_spec: PartitionSpec) -> Any:
    """Each device runs its own groups one after another; `combine` maps (own groups, ...) to its part of the result."""
    own = groups // num_batch_shards(jax.sharding.get_abstract_mesh())

    def local(shared: Any, batch: Any) -> Any:
        shared = jax.tree.map(_row_major, shared)
        split = jax.tree.map(lambda x: x.reshape(own, x.shape[0] // own, *x.shape[1:]), batch)
        split = jax.tree.map(_with_unused_group, split)
        end = _hidden_trip_count(own)

        def run(i: jax.Array, results: Any) -> Any:
            group = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), split)
            result = _isolated(fn, shared, group)
            return jax.tree.map(lambda all, x: jax.lax.dynamic_update_index_in_dim(all, x, i, 0), results, result)

        shapes = jax.eval_shape(fn, shared, jax.tree.map(lambda x: x[0], split))
        results = jax.tree.map(lambda x: jnp.zeros((own, *x.shape), x.dtype), shapes)
        return jax.tree.map(combine, jax.lax.fori_loop(0, end, run, results))

    in_specs = (PartitionSpec(), PartitionSpec(BATCH))
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_spec, check_vma=False)(replicate(shared), batch)


def _row_major(x: jax.Array) -> jax.Array:
    """Fixes the memory layout: a parameter gathered along its last dimension would otherwise lie differently in
    memory, and matmuls would round differently."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _with_unused_group(split: jax.Array) -> jax.Array:
    """Appends a group that no iteration reads: the compiler would hoist a single group out of the loop."""
    return jnp.concatenate([split, split[:1]])


def _hidden_trip_count(own: int) -> jax.Array:
    """`own`, in a form that the compiler cannot evaluate: it would unroll a loop known to run once."""
    return jnp.minimum(own, own + jax.lax.axis_index(BATCH))


def _isolated(fn: Any, shared: Any, group: Any) -> Any:
    """`fn(shared, group)` between barriers, which keep the compiler from fusing it with the code around it."""
    return jax.lax.optimization_barrier(fn(*jax.lax.optimization_barrier((shared, group))))


def _ordered_sum(results: jax.Array) -> jax.Array:
    """Sum over the groups of all devices, in their order. Each device adds one slice of every group's result and then
    all gather the sums, so that no device ever holds more than its own groups (see the picture above)."""
    own, *shape = results.shape
    devices = jax.lax.axis_size(BATCH)
    flat = results.reshape(own, -1)
    size = flat.shape[1]
    flat = jnp.pad(flat, ((0, 0), (0, -size % devices)))
    slices = jax.lax.all_to_all(flat, BATCH, split_axis=1, concat_axis=0, tiled=True)
    total = slices[0]
    for i in range(1, len(slices)):
        total = total + slices[i]
    return jax.lax.all_gather(total, BATCH, tiled=True)[:size].reshape(shape)
