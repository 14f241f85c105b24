"""Batches on the mesh: each process's rows as global arrays, microbatches, and groups of rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_mlm.distributed.mesh import BATCH, num_batch_shards


def abstract_batch(B: int, L: int, mesh: Mesh, has_progress: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the result of `shard_batch`."""
    arrays: dict[str, Any] = {"tokens": ((B, L), np.int32), "row_ids": ((B, 2), np.uint32), "stop": ((B,), np.bool_)}
    if has_progress:
        arrays["progress"] = ((B,), np.float32)
    split = NamedSharding(mesh, PartitionSpec(BATCH))
    return {name: jax.ShapeDtypeStruct(*array, sharding=split) for name, array in arrays.items()}


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Indices of the batch's rows on this process's devices: int64 (n,), ascending. On a TPU slice they need not be
    consecutive, and processes that differ only in `tensor` have the same rows."""
    indices = NamedSharding(mesh, PartitionSpec(BATCH)).addressable_devices_indices_map((batch_size,)).values()
    ranges = {rows.indices(batch_size)[:2] for (rows,) in filter(None, indices)}
    return np.concatenate([np.arange(*one) for one in sorted(ranges)])


def shard_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, stop: bool = False, progress: float | None = None
) -> dict[str, jax.Array]:
    """Arrays of the global batch from the rows that the pipeline gave each process.

    `stop` (this process was asked to end the run) and, in a run with a budget, `progress` (the fraction of the run at
    the end of the step, by this process's clock) travel with the rows. The step returns whether any process wants to
    stop, and the largest progress, so that all processes learn of it at the same step without a message.
    """
    rows = len(batch["tokens"])
    more = {} if progress is None else {"progress": np.full(rows, progress, np.float32)}
    return shard_rows({**batch, **more, "stop": np.full(rows, stop)}, mesh)


def shard_rows(tree: Any, mesh: Mesh) -> Any:
    """Global arrays (B, ...), split over the mesh, from arrays of each process's `local_rows`."""
    sharding, shards = NamedSharding(mesh, PartitionSpec(BATCH)), num_batch_shards(mesh)
    local_shards = local_rows(mesh, shards).tolist()

    def to_global(x: np.ndarray) -> jax.Array:
        size = len(x) // len(local_shards)

        def shard(index: Any) -> np.ndarray:
            i = local_shards.index((index[0].start or 0) // size)
            return x[i * size : (i + 1) * size]

        return jax.make_array_from_callback((size * shards, *x.shape[1:]), sharding, shard)

    return jax.tree.map(to_global, tree)


def shard_replicated_rows(tree: Any, mesh: Mesh) -> Any:
    """Global arrays (B, ...), split over the mesh, from arrays of all rows that every process holds."""
    return shard_rows(jax.tree.map(lambda x: x[local_rows(mesh, len(x))], tree), mesh)


def split_microbatches(x: jax.Array, count: int) -> jax.Array:
    """(B, ...) -> (M, B/M, ...). Microbatch m takes every M-th row, so that no row leaves its device."""
    spec = PartitionSpec(BATCH, *[None] * x.ndim)
    split = jax.lax.reshape(x, (x.shape[0] // count, count, *x.shape[1:]), out_sharding=spec)
    return jnp.swapaxes(split, 0, 1)


def merge_rows(x: jax.Array) -> jax.Array:
    """(B, G, ...) -> (B·G, ...), each group staying on its device."""
    return jax.lax.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), out_sharding=PartitionSpec(BATCH))


def unmerge_rows(x: jax.Array, size: int) -> jax.Array:
    """(B·G, ...) -> (B, G, ...), the inverse of `merge_rows` for groups of `size` rows."""
    return jax.lax.reshape(x, (x.shape[0] // size, size, *x.shape[1:]), out_sharding=PartitionSpec(BATCH))
