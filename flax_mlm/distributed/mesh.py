"""The device mesh, and which of its axes splits which dimension.

The mesh has explicit axes (`jax.sharding.AxisType.Explicit`): every array's type carries its sharding, JAX
propagates it, and an ambiguous sharding is an error rather than a silent copy.

  data    splits the batch
  fsdp    splits the batch, and the parameters and optimizer state (ZeRO-3: gathered layer by layer)
  tensor  splits heads, MLP width and vocabulary

Axis names appear in `distributed/` only; the model names dimensions by their letters.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_mlm.config.schema import MeshConfig
from flax_mlm.distributed import compilation_cache
from flax_mlm.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that split the batch dimension

# Mesh axis that splits a parameter dimension, by the dimension's letter.
_AXIS_OF_DIM = {"V": "tensor", "D": "fsdp", "H": "tensor", "F": "tensor"}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of shape (data, fsdp, tensor) over all devices; with several TPU slices, only `data` crosses them.

    Raises:
      UserError: JAX finds no devices, the sizes do not multiply to their number, or `data` is not a multiple of the
        slices.
    """
    compilation_cache.prepare()
    devices = _all_devices() if devices is None else devices
    inner = config.fsdp * config.tensor
    data = config.data if config.data != -1 else max(1, len(devices) // inner)
    if data * inner != len(devices):
        what = f"mesh.data × mesh.fsdp × mesh.tensor is {data} × {config.fsdp} × {config.tensor} = {data * inner}"
        raise UserError(f"{what}; expected {len(devices)}, the number of devices")
    is_tpu = devices[0].platform == "tpu"  # on other platforms each machine counts as a slice
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if is_tpu else 1
    if data % slices:
        expected = f"expected a multiple of {slices}, the number of TPU slices"
        why = "a slice holds whole copies of the model, and only gradients cross the network between slices"
        raise UserError(f"mesh.data is {data}; {expected}, because {why}")
    within = (data // slices, config.fsdp, config.tensor)
    if slices == 1:
        grid = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, (AxisType.Explicit,) * 3)


def _all_devices() -> Sequence[jax.Device]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as e:  # JAX asserts that a known platform has a plugin
        reason = " ".join(str(e).split()) or "JAX has no plugin for it"
        remedy = "correct JAX_PLATFORMS, or unset it to take what is there"
        raise UserError(f"JAX_PLATFORMS is '{os.environ.get('JAX_PLATFORMS', '')}': {reason}; {remedy}") from e


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Sets the mesh of this thread, that functions are compiled, by which rule keys become random bits, and that arrays
    of the host may be passed to functions: JAX_TRANSFER_GUARD is for finding copies in a program of one's own."""
    with (
        jax.set_mesh(mesh),
        jax.disable_jit(False),
        jax.threefry_partitionable(True),
        jax.transfer_guard("allow"),
    ):
        yield


def num_batch_shards(mesh: Any) -> int:
    """Number of shards of the batch dimension on a `Mesh` or `AbstractMesh`."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH]))


def check_batch(name: str, size: int, mesh: Mesh, gradient_accumulation_steps: int = 1) -> None:
    """Raises UserError unless `size` rows can be split over the mesh, and into microbatches.

    Args:
      name: config field that the message names.
    """
    divisor = num_batch_shards(mesh) * gradient_accumulation_steps
    if size % divisor:
        each = f" × {gradient_accumulation_steps} microbatches" if gradient_accumulation_steps > 1 else ""
        factors = f"mesh data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']}{each}"
        raise UserError(f"{name} is {size}; expected a multiple of {divisor} ({factors})")


def param_spec(dims: str, ndim: int) -> PartitionSpec:
    """Spec of a parameter whose trailing dimensions are the letters `dims`; vectors are replicated."""
    if len(dims) < 2:
        return PartitionSpec()
    return PartitionSpec(*[None] * (ndim - len(dims)), *[_AXIS_OF_DIM.get(d) for d in dims])


def shard_params(params: Any, dims: Any) -> Any:
    """Parameters split over the mesh as their dimensions' letters say.

    Args:
      dims: for each parameter, the letters of its trailing dimensions (`model.heads.Model.dims`).
    """
    return jax.tree.map(lambda x, d: jax.reshard(x, param_spec(d, x.ndim)), params, dims)


def batch_spec(*inner: str | None) -> PartitionSpec:
    """Spec of an activation: batch dimension split over the mesh, then one dimension per letter (None: not split).

    Inside `per_row`, `map_groups` and `sum_groups` a device sees only its own rows, and nothing is split.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        return PartitionSpec(None, *[None for _ in inner])
    return PartitionSpec(BATCH, *[_AXIS_OF_DIM.get(d) if d in ("H", "F", "V") else None for d in inner])


def per_row(fn: Any, batch: Any, *replicated: Any) -> Any:
    """`fn(batch, *replicated)` run by each device on its own rows, for code that treats every row alone (gathers,
    sorts). The results' first dimension is the batch."""
    specs = (PartitionSpec(BATCH), *(PartitionSpec() for _ in replicated))
    return jax.shard_map(fn, in_specs=specs, out_specs=PartitionSpec(BATCH))(batch, *replicated)


def per_row_and_head(fn: Any, states_BLHd: Any, batch: Any, *replicated: Any) -> Any:
    """`fn(*states, batch, *replicated)` run by each device on its own rows and heads, for kernels that the compiler
    cannot split. The result has the shape (B, L, H, d) of one of the states."""
    spec = batch_spec(None, "H", None)
    specs = (*(spec for _ in states_BLHd), PartitionSpec(BATCH), *(PartitionSpec() for _ in replicated))
    return jax.shard_map(fn, in_specs=specs, out_specs=spec, check_vma=False)(*states_BLHd, batch, *replicated)


def reshard_like(tree: Any, other: Any) -> Any:
    """`tree` with the shardings of `other`."""
    return jax.tree.map(lambda x, y: jax.reshard(x, jax.typeof(y).sharding.spec), tree, other)


def replicate(tree: Any) -> Any:
    """`tree` whole on every device, so that every process can read it."""
    return jax.tree.map(lambda x: jax.reshard(x, PartitionSpec()), tree)


def with_auto_axes(fn: Any, like: Any) -> Any:
    """`fn` traced with automatic sharding, its results sharded as `like`. For code whose matmuls contract split
    dimensions (Muon's Newton–Schulz iteration)."""
    return jax.sharding.auto_axes(fn, out_sharding=jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like))


def bind_to_mesh(tree: Any, mesh: Mesh) -> Any:
    """`jax.ShapeDtypeStruct`s whose abstract shardings are replaced by shardings on the devices of `mesh`."""

    def bind(x: Any) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(bind, tree)
