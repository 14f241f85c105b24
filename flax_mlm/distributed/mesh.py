"""The device mesh. The only file with axis names.

The mesh has explicit axes (`jax.sharding.AxisType.Explicit`): every array's type carries its sharding, JAX
propagates it, and what is ambiguous is an error rather than a silent copy.

  data    splits the batch
  fsdp    splits the batch, and the parameters and optimizer state (ZeRO-3: gathered layer by layer)
  tensor  splits heads, MLP width and vocabulary
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_mlm.config.schema import MeshConfig
from flax_mlm.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that split the batch dimension

# Which mesh axis splits a parameter dimension, by the dimension's letter (see model/encoder.py).
_AXIS_OF_DIM = {"V": "tensor", "D": "fsdp", "H": "tensor", "F": "tensor"}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of shape (data, fsdp, tensor) over all devices; of several TPU slices, `data` is what crosses them.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `data` is not a multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    inner = config.fsdp * config.tensor
    data = config.data if config.data != -1 else max(1, len(devices) // inner)
    if data * inner != len(devices):
        raise UserError(
            f"mesh.data × mesh.fsdp × mesh.tensor is {data} × {config.fsdp} × {config.tensor} = {data * inner}, "
            f"but there are {len(devices)} devices; the product must equal that"
        )
    axis_types = (AxisType.Explicit,) * 3
    is_tpu = devices[0].platform == "tpu"  # elsewhere each machine counts as a slice
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if is_tpu else 1
    if slices == 1:
        shape = (data, config.fsdp, config.tensor)
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types)
    if data % slices:
        raise UserError(
            f"mesh.data is {data}, with {slices} TPU slices; it must be a multiple of that, "
            "for the network between slices carries the gradients of whole copies of the model and nothing else"
        )
    within, between = (data // slices, config.fsdp, config.tensor), (slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types)


def num_batch_shards(mesh: Any) -> int:
    """Into how many parts the mesh splits the batch."""
    return int(np.prod([mesh.shape[a] for a in BATCH]))


def check_batch(name: str, size: int, mesh: Mesh, gradient_accumulation_steps: int = 1) -> None:
    """Raises UserError unless `size` rows can be split over the mesh (and into microbatches)."""
    parts = num_batch_shards(mesh)
    if size % (parts * gradient_accumulation_steps):
        each = f" × {gradient_accumulation_steps} microbatches" if gradient_accumulation_steps > 1 else ""
        raise UserError(
            f"{name} is {size}; it must be divisible by {parts * gradient_accumulation_steps} "
            f"(mesh data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']}{each})"
        )


def param_spec(dims: str, ndim: int) -> PartitionSpec:
    """The spec of a parameter whose trailing dimensions are the letters `dims`; vectors are replicated."""
    if len(dims) < 2:
        return PartitionSpec()
    return PartitionSpec(*[None] * (ndim - len(dims)), *[_AXIS_OF_DIM.get(d) for d in dims])


def batch_spec(*inner: str | None) -> PartitionSpec:
    """Batch dimension split over the mesh; the other dimensions as named by their letters (None: not split).

    Inside `per_row` and `by_groups` a device sees only its own rows, and nothing is split.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        return PartitionSpec(None, *[None for _ in inner])
    return PartitionSpec(BATCH, *[_AXIS_OF_DIM.get(d) if d in ("H", "F", "V") else None for d in inner])


def gather_fsdp(tree: Any, dtype: Any = None) -> Any:
    """The same parameters, whole along `fsdp`: an all-gather, whose gradient is a reduce-scatter along `fsdp` and only
    then, for the slice that is left, an all-reduce along `data`.

    Args:
      dtype: what is gathered is cast to it before, so that less has to travel, both ways; None: as it is.
    """

    def gather(x: jax.Array) -> jax.Array:
        spec = jax.typeof(x).sharding.spec
        return _gather(x.astype(dtype or x.dtype), spec) if "fsdp" in spec else x

    # Along an axis of one device it would do nothing, but the compiler keeps it, and copies for it.
    return jax.tree.map(gather, tree) if splits_parameters() else tree


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    whole = (None if axis == "fsdp" else axis for axis in spec)
    return jax.reshard(x, PartitionSpec(*whole, reduced=set(BATCH)))


def _gather_backward(spec: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    axis = spec.index("fsdp")

    def add(parts: jax.Array) -> jax.Array:
        # The TPU compiler scatters where a device's share is contiguous in memory, tiles and all; else it would add
        # everything everywhere and then cut.
        front = jax.numpy.moveaxis(parts, axis, 0)
        devices = jax.lax.axis_size("fsdp")
        share = (front.shape[0] // devices, *front.shape[1:])
        lanes = math.gcd(math.prod(share), 128)
        own = jax.lax.psum_scatter(front.reshape(devices, -1, lanes), "fsdp", scatter_dimension=0)
        return jax.numpy.moveaxis(jax.lax.psum(own.reshape(share), "data"), 0, axis)

    whole = (None if axis == "fsdp" else axis for axis in spec)
    parts = PartitionSpec(*whole, unreduced=set(BATCH))
    return (jax.shard_map(add, in_specs=parts, out_specs=spec)(gradient),)


_gather.defvjp(lambda x, spec: (_gather(x, spec), None), _gather_backward)


def splits_parameters() -> bool:
    """Whether layers have to gather their parameters."""
    return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1


def save_all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: the backward pass gathers a layer's parameters again, and cuts them apart, for kept
    from the forward pass they would be the whole model on every device."""
    inner = params.get("call_jaxpr")  # of `_gather`, a function with a derivative of its own
    if primitive.name in ("split", "squeeze"):
        return False
    return inner is None or all(equation.primitive.name != "reshard" for equation in inner.eqns)


def per_row(fn: Any, batch: Any, *replicated: Any) -> Any:
    """`fn(batch, *replicated)` run by each device on its own rows, for code that treats every row alone (gathers,
    sorts). Results have the rows first."""
    specs = (PartitionSpec(BATCH), *(PartitionSpec() for _ in replicated))
    return jax.shard_map(fn, in_specs=specs, out_specs=PartitionSpec(BATCH))(batch, *replicated)


def per_row_and_head(fn: Any, states_BLHd: Any, batch: Any, *replicated: Any) -> Any:
    """`fn(*states, batch, *replicated)` run by each device on its own rows and heads, for kernels that the compiler
    cannot split. The result is one of the states."""
    spec = batch_spec(None, "H", None)
    specs = (*(spec for _ in states_BLHd), PartitionSpec(BATCH), *(PartitionSpec() for _ in replicated))
    return jax.shard_map(fn, in_specs=specs, out_specs=spec, check_vma=False)(*states_BLHd, batch, *replicated)


def by_groups(fn: Any, groups: int, shared: Any, batch: Any, add: bool) -> Any:
    """`fn(shared, part)` for each of `groups` equal parts of the batch: the same computation, of the same shape,
    however many devices split the batch. A device takes its own parts one after another.

    Args:
      fn: returns sums over its part when `add`, else results that have the rows first.
      groups: a multiple of the number of devices that split the batch.
      add: the results of all parts are added in the order of the rows, so that the sum is the same bit for bit;
        it is whole on every device.
    """
    devices = num_batch_shards(jax.sharding.get_abstract_mesh())
    own = groups // devices

    def local(shared: Any, batch: Any) -> Any:
        # Parameters gathered along their last dimension would lie otherwise in memory, and matmuls round otherwise.
        shared = jax.tree.map(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), shared)
        parts = jax.tree.map(lambda x: x.reshape(own, x.shape[0] // own, *x.shape[1:]), batch)
        # One more, never used: of a single part the compiler knows that it is the same in every turn of the loop.
        parts = jax.tree.map(lambda x: jax.numpy.concatenate([x, x[:1]]), parts)
        # Nor may it know how often the loop turns, for it unwraps one that turns once; and barriers keep it from fusing
        # a part with what surrounds it. Each of these would round otherwise.
        turns = jax.numpy.minimum(own, own + jax.lax.axis_index(BATCH))

        def turn(i: jax.Array, results: Any) -> Any:
            part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), parts)
            result = jax.lax.optimization_barrier(fn(*jax.lax.optimization_barrier((shared, part))))
            return jax.tree.map(lambda all, x: jax.lax.dynamic_update_index_in_dim(all, x, i, 0), results, result)

        shapes = jax.eval_shape(fn, shared, jax.tree.map(lambda x: x[0], parts))
        results = jax.tree.map(lambda x: jax.numpy.zeros((own, *x.shape), x.dtype), shapes)
        results = jax.lax.fori_loop(0, turns, turn, results)
        return jax.tree.map(ordered_sum if add else lambda x: x.reshape(-1, *x.shape[2:]), results)

    def ordered_sum(x: jax.Array) -> jax.Array:
        # Each device adds one slice of the parts of all, and then all gather the slices: a device never holds
        # more than its own parts.
        flat = x.reshape(own, -1)
        flat = jax.numpy.pad(flat, ((0, 0), (0, -flat.shape[1] % devices)))
        slices = jax.lax.all_to_all(flat, BATCH, split_axis=1, concat_axis=0, tiled=True)
        total = slices[0]
        for i in range(1, groups):
            total = total + slices[i]
        return jax.lax.all_gather(total, BATCH, tiled=True)[: x[0].size].reshape(x.shape[1:])

    out = PartitionSpec() if add else PartitionSpec(BATCH)
    run = jax.shard_map(local, in_specs=(PartitionSpec(), PartitionSpec(BATCH)), out_specs=out, check_vma=False)
    return run(replicate(shared), batch)


def like(tree: Any, other: Any) -> Any:
    """`tree` laid out as `other` is."""
    return jax.tree.map(lambda x, y: jax.reshard(x, jax.typeof(y).sharding.spec), tree, other)


def replicate(tree: Any) -> Any:
    """Whole on every device, so that every process can read it."""
    return jax.tree.map(lambda x: jax.reshard(x, PartitionSpec()), tree)


def split_microbatches(x: jax.Array, parts: int) -> jax.Array:
    """(B, ...) -> (M, B/M, ...). Microbatch m takes every M-th row, so that no row leaves its device."""
    split = jax.lax.reshape(
        x,
        (x.shape[0] // parts, parts, *x.shape[1:]),
        out_sharding=PartitionSpec(BATCH, *[None] * x.ndim),
    )
    return jax.numpy.swapaxes(split, 0, 1)


def merge_rows(tree: Any) -> Any:
    """(B, G, ...) -> (B·G, ...), the groups of a device staying on it."""
    spec = PartitionSpec(BATCH)
    return jax.tree.map(lambda x: jax.lax.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), out_sharding=spec), tree)


def unmerge_rows(x: jax.Array, size: int) -> jax.Array:
    """(B·G, ...) -> (B, G, ...), the inverse of `merge_rows` for groups of `size`."""
    return jax.lax.reshape(x, (x.shape[0] // size, size, *x.shape[1:]), out_sharding=PartitionSpec(BATCH))


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


def abstract_batch(
    batch_size: int, seq_len: int, mesh: Mesh, has_progress: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `global_batch` makes of the pipeline's rows, without values."""
    split = NamedSharding(mesh, PartitionSpec(BATCH))
    progress = {"progress": jax.ShapeDtypeStruct((batch_size,), np.float32, sharding=split)} if has_progress else {}
    return {
        **progress,
        "tokens": jax.ShapeDtypeStruct((batch_size, seq_len), np.int32, sharding=split),
        "row_ids": jax.ShapeDtypeStruct((batch_size, 2), np.uint32, sharding=split),
        "stop": jax.ShapeDtypeStruct((batch_size,), np.bool_, sharding=split),
    }


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch lie on this process's devices: int64 (n,), in order. Of a TPU slice they need not follow
    each other, and processes that share them by `tensor` have the same."""
    split = NamedSharding(mesh, PartitionSpec(BATCH))
    indices = split.addressable_devices_indices_map((batch_size,)).values()
    parts = {rows.indices(batch_size)[:2] for (rows,) in filter(None, indices)}
    return np.concatenate([np.arange(*part) for part in sorted(parts)])


def global_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, stop: bool = False, progress: float | None = None
) -> dict[str, jax.Array]:
    """The pipeline's rows, each process's own, as arrays of the global batch.

    `stop` is this process's wish to end the run, and `progress`, where there is a budget, the share of the run that the
    step ends at by its clock. They travel with the rows, and a step returns whether any process wants to end, and the
    largest progress: so all learn of it at the same step, without a message.
    """
    rows = len(batch["tokens"])
    more = {} if progress is None else {"progress": np.full(rows, progress, np.float32)}
    return split_rows({**batch, **more, "stop": np.full(rows, stop)}, mesh)


def split_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays of each process's `own_rows` -> arrays of all rows, split over the mesh."""
    sharding, parts = NamedSharding(mesh, PartitionSpec(BATCH)), own_rows(mesh, num_batch_shards(mesh)).tolist()

    def whole(x: np.ndarray) -> jax.Array:
        size = len(x) // len(parts)

        def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index
            place = parts.index((index[0].start or 0) // size)
            return x[place * size : (place + 1) * size]

        return jax.make_array_from_callback((size * num_batch_shards(mesh), *x.shape[1:]), sharding, of_device)

    return jax.tree.map(whole, tree)


def shard_replicated_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays of all rows, the same in every process, split over the mesh."""
    return split_rows(jax.tree.map(lambda x: x[own_rows(mesh, len(x))], tree), mesh)
