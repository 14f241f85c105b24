"""The device mesh. The only file with axis names.

The mesh has explicit axes (`jax.sharding.AxisType.Explicit`): every array's type carries its sharding, JAX
propagates it, and what is ambiguous is an error rather than a silent copy.

  data    splits the batch
  fsdp    splits the batch, and the parameters and optimizer state (ZeRO-3: gathered layer by layer)
  tensor  splits heads, MLP width and vocabulary
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_mlm.config import MeshConfig
from flax_mlm.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that split the batch dimension

# Which mesh axis splits a parameter dimension, by the dimension's letter (see model/encoder.py).
_AXIS_OF_DIM = {"V": "tensor", "D": "fsdp", "H": "tensor", "F": "tensor"}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of shape (data, fsdp, tensor) over all devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    inner = config.fsdp * config.tensor
    data = config.data if config.data != -1 else max(1, len(devices) // inner)
    if data * inner != len(devices):
        raise UserError(
            f"mesh.data × mesh.fsdp × mesh.tensor is {data} × {config.fsdp} × {config.tensor} = {data * inner}, "
            f"but there are {len(devices)} devices; the product must equal that"
        )
    return jax.make_mesh((data, config.fsdp, config.tensor), AXES, (AxisType.Explicit,) * 3, devices=devices)


def check_batch(name: str, size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises UserError unless `size` rows can be split over the mesh (and into microbatches)."""
    parts = int(np.prod([mesh.shape[a] for a in BATCH]))
    if size % (parts * microbatches):
        each = f" × {microbatches} microbatches" if microbatches > 1 else ""
        raise UserError(
            f"{name} is {size}; it must be divisible by {parts * microbatches} "
            f"(mesh data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']}{each})"
        )


def param_spec(dims: str, ndim: int) -> PartitionSpec:
    """The spec of a parameter whose trailing dimensions are the letters `dims`; vectors are replicated."""
    if len(dims) < 2:
        return PartitionSpec()
    return PartitionSpec(*[None] * (ndim - len(dims)), *[_AXIS_OF_DIM.get(d) for d in dims])


def batch_spec(*inner: str | None) -> PartitionSpec:
    """Batch dimension split over the mesh; the other dimensions as named by their letters (None: not split)."""
    return PartitionSpec(BATCH, *[_AXIS_OF_DIM.get(d) if d in ("H", "F", "V") else None for d in inner])


def gather_fsdp(tree: Any) -> Any:
    """The same parameters, whole along `fsdp` (an all-gather; its transpose is a reduce-scatter)."""

    def gather(x: jax.Array) -> jax.Array:
        spec = PartitionSpec(*[None if axis == "fsdp" else axis for axis in jax.typeof(x).sharding.spec])
        return jax.reshard(x, spec)

    return jax.tree.map(gather, tree)


def per_row(fn: Any, batch: Any, *replicated: Any) -> Any:
    """`fn(batch, *replicated)` run by each device on its own rows, for code that treats every row alone (gathers,
    sorts). Results have the rows first."""
    specs = (PartitionSpec(BATCH), *(PartitionSpec() for _ in replicated))
    return jax.shard_map(fn, in_specs=specs, out_specs=PartitionSpec(BATCH))(batch, *replicated)


def replicate(tree: Any) -> Any:
    """Whole on every device, so that every process can read it."""
    return jax.tree.map(lambda x: jax.reshard(x, PartitionSpec()), tree)


def split_microbatches(x: jax.Array, microbatches: int) -> jax.Array:
    """(B, ...) -> (M, B/M, ...). Microbatch m takes every M-th row, so that no row leaves its device."""
    split = jax.lax.reshape(
        x,
        (x.shape[0] // microbatches, microbatches, *x.shape[1:]),
        out_sharding=PartitionSpec(BATCH, *[None] * x.ndim),
    )
    return jax.numpy.swapaxes(split, 0, 1)


def without_axes(fn: Any, like: Any) -> Any:
    """`fn` traced with automatic sharding; its results are laid out as `like`. For code (Newton–Schulz) whose
    matmuls contract split dimensions."""
    return jax.sharding.auto_axes(fn, out_sharding=jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like))


def concrete(tree: Any, mesh: Mesh) -> Any:
    """Shapes with abstract shardings -> shapes with shardings on this mesh's devices."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def abstract_batch(batch_size: int, seq_len: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What `global_batch` makes of the pipeline's rows, without values."""
    split = NamedSharding(mesh, PartitionSpec(BATCH))
    return {
        "tokens": jax.ShapeDtypeStruct((batch_size, seq_len), np.int32, sharding=split),
        "row_ids": jax.ShapeDtypeStruct((batch_size, 2), np.uint32, sharding=split),
    }


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Each process's rows -> arrays of the global batch, split over the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}
