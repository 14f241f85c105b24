"""Worker of `compile_step_for`: reads a JSON request, traces or compiles the train step, and prints JSON."""

import dataclasses
import json
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from flax_mlm.config.load import build, from_dict
from flax_mlm.config.phases import Phase, parse_phases
from flax_mlm.config.schema import Config
from flax_mlm.distributed import batches, chips
from flax_mlm.distributed.mesh import bind_to_mesh, check_batch, make_mesh, num_batch_shards, use_mesh
from flax_mlm.errors import UserError
from flax_mlm.model.attention import dispatch, xla
from flax_mlm.model.heads import vocab_rows
from flax_mlm.objectives.masking import rates_at
from flax_mlm.objectives.rows import Vocabulary
from flax_mlm.planning import cost, hlo
from flax_mlm.planning.compile import CompiledStep, Target
from flax_mlm.training.step import Training, build_training, model_inputs


def answer(config: Config, vocab_size: int, target: Target, compiles: bool) -> CompiledStep:
    """Traces or compiles the train step of a run's first phase."""
    phase = parse_phases(config)[0]
    config = phase.config
    jax.config.update("jax_compilation_cache_dir", None)
    cudnn = target.kind == "gpu" and dispatch.resolve_attention(config, "gpu", lambda width: True) == "cudnn"
    if cudnn:  # it can only be traced where cuDNN is
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
        phase = phase._replace(config=config)
    t, mesh = config.train, make_mesh(config.mesh, _devices(target))
    check_batch("train.global_batch_size", t.global_batch_size, mesh, t.gradient_accumulation_steps)
    if t.reproducible:
        check_batch("train.batch_groups", t.batch_groups, mesh)
    with use_mesh(mesh):
        training, vocab = build_training(config, vocab_size, mesh, phase), _abstract_vocabulary(vocab_size, mesh)
        step = _traced(phase, vocab_size, training, mesh, vocab)
        step.cudnn = cudnn
        if not compiles:
            return step
        rows = batches.abstract_batch(t.global_batch_size, config.data.seq_len, mesh, phase.num_steps is None)
        lowered, begin = training.step.lower(training.abstract, rows, vocab), time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            step.error = " ".join(str(e).split("\n\n")[0].split())
            return step
    step.compile_seconds = time.perf_counter() - begin
    _measure(step, compiled, target, devices=list(mesh.devices.flat))
    return step


def _traced(phase: Phase, vocab_size: int, training: Training, mesh: Any, vocab: Any) -> CompiledStep:
    """Measures what is known before the step is compiled."""
    config, devices, state = phase.config, list(mesh.devices.flat), training.abstract
    choice = dispatch.resolve_attention(config, devices[0].platform)
    kernel = dispatch.select_kernel(choice, config.data.seq_len, config.model.attention_dropout_rate > 0.0)
    return CompiledStep(
        device_kind=devices[0].device_kind,
        devices=len(devices),
        chips=chips.count(devices),
        mesh=dict(mesh.shape),
        parameters=sum(x.size for x in jax.tree.leaves(state.params)),
        vocab_rows=vocab_rows(config.model, vocab_size),
        flops=training.flops,
        attention="xla" if kernel is xla.xla else "splash",
        parameter_bytes=_device_bytes(state.params),
        optimizer_bytes=_device_bytes((state.opt_state, state.average)),
        activation_bytes=_activation_bytes(phase, training, mesh, vocab),
    )


def _measure(step: CompiledStep, compiled: Any, target: Target, devices: list[Any]) -> None:
    """Adds the measurements of the compiled program."""
    memory, program = compiled.memory_analysis(), hlo.Program(compiled.as_text())
    step.argument_bytes = memory.argument_size_in_bytes
    step.temporary_bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    if target.is_tpu:  # only TPUs report the peak; temporaries may reuse donated memory, so that the sum is too high
        step.temporary_bytes = memory.peak_memory_in_bytes - step.argument_bytes
    step.traffic, step.matmul_flops = cost.traffic(program), cost.matmul_flops(program)
    step.fusions, step.copies = cost.count(program, "fusion"), cost.count(program, "copy", "copy-start")
    for collective in cost.collectives(program, step.mesh, target.slices):
        group = [devices[i] for i in collective.group]
        links = _links(group, target) if target.is_tpu and group else 0.0
        step.collectives.append({**collective._asdict(), "sent": collective.sent, "links": links})


def _devices(target: Target) -> list[Any]:
    if not target.is_tpu:
        return jax.devices()
    name, options = f"{target.kind}:{target.shape}", dict[str, Any]()
    if set(target.shape) <= set("1x"):
        name, options = f"{target.kind}:1x1x1", {"chips_per_host_bounds": [1, 1, 1]}
    if target.kind == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on a TPU VM
    if target.slices > 1:
        options["num_slices"] = target.slices
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as e:  # several types, all with the reason in their first line
        raise UserError(f"--topology={target.kind}:{target.shape}: {str(e).splitlines()[0]}") from e


def _abstract_vocabulary(size: int, mesh: Any) -> Vocabulary:
    """Shapes of `Vocabulary` for a vocabulary with five special tokens."""
    replicated = NamedSharding(mesh, PartitionSpec())
    flags: Any = jax.ShapeDtypeStruct((size,), np.bool_, sharding=replicated)
    ids: Any = jax.ShapeDtypeStruct((size - 5,), np.int32, sharding=replicated)
    return Vocabulary(flags, flags, flags, ids, 0, 2, 4)


def _device_bytes(tree: Any) -> int:
    """Bytes of one device's shards."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _activation_bytes(phase: Phase, training: Training, mesh: Any, vocab: Any) -> int:
    """Bytes that a device keeps from the forward pass of a (micro)batch for the backward pass."""
    config, loss = phase.config, training.forward.loss

    def forward(params: Any, batch: Any, vocab: Any) -> Any:
        targets, keys_B = model_inputs(phase, batch, vocab, rates_at(phase, 0.0))
        counts = loss.counts(targets)
        _, backward = jax.vjp(lambda p: loss.total(loss.predict(p, targets, keys_B), counts)[0], params)
        return backward

    groups_per_device = config.train.batch_groups // num_batch_shards(mesh) if config.train.reproducible else 1
    rows = config.train.global_batch_size // (config.train.gradient_accumulation_steps * groups_per_device)
    batch = batches.abstract_batch(rows, config.data.seq_len, mesh)
    jaxpr = jax.make_jaxpr(forward)(training.abstract.params, batch, vocab).jaxpr
    inputs_of_jaxpr = {id(v) for v in jaxpr.invars}
    kept = {id(v): v.aval for v in jaxpr.outvars if id(v) not in inputs_of_jaxpr and hasattr(v.aval, "sharding")}
    arrays = [x for x in kept.values() if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)]
    return _device_bytes(bind_to_mesh(arrays, mesh))


def _links(group: list[Any], target: Target) -> float:
    """Number of links that each chip of a group can send through at once.

    Each dimension of the slice that the group spans counts 2 where it is a ring, else 1; where the group takes every
    n-th chip, n groups share the links. A group of cores of one chip has none.
    """
    chip = chips.of_kind(group[0].device_kind)
    shape = [int(n) for n in target.shape.split("x")]
    links = 0.0
    for dimension, coordinates in enumerate(zip(*(device.coords for device in group), strict=True)):
        occupied = sorted(set(coordinates))
        if len(occupied) > 1:
            length = shape[dimension] if dimension < len(shape) else 1
            relevant = shape if chip and chip.together else [length]
            is_ring = chip is not None and len(occupied) == length and all(n % chip.wraps == 0 for n in relevant)
            links += (2 if is_ring else 1) * (len(occupied) - 1) / (occupied[-1] - occupied[0])
    return links


if __name__ == "__main__":
    try:
        config_dict, size, target_fields, compiles_too = json.load(sys.stdin)
        result = dataclasses.asdict(answer(build(from_dict(config_dict)), size, Target(*target_fields), compiles_too))
    except UserError as e:
        result = {"user_error": str(e)}
    print(json.dumps(result))
