"""The train step, compiled for devices that are not here: what it needs, and what it moves.

The TPU compiler runs without a TPU, but it wants an environment of its own, and takes down the process when it fails
badly. So `rehearse` asks a child process, `python -m flax_mlm.planning.compile`, a JSON object in and one out.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from flax_mlm.config import phases
from flax_mlm.config.load import build, from_dict
from flax_mlm.config.schema import Config
from flax_mlm.errors import Failure, UserError

_EXTRA = "launch/tpu-requirements.txt"


class Target(NamedTuple):
    """The devices to compile for, as the user names them: v5e:4x4, cpu, cpu:8, gpu:h100, gpu:h100:8."""

    kind: str  # cpu, gpu, or the generation of the TPU
    shape: str  # of a TPU slice; for others the number of devices
    slices: int = 1
    gpu: str = ""

    def __str__(self) -> str:
        name = ":".join(filter(None, (self.kind, self.gpu, self.shape)))
        return name if self.slices == 1 else f"{name} × {self.slices} slices"

    @property
    def is_tpu(self) -> bool:
        return self.kind not in ("cpu", "gpu")


def parse(text: str, slices: int = 1) -> Target:
    """Reads `--topology`.

    Raises:
      UserError: it does not name devices.
    """
    kind, *rest = text.split(":")
    if kind in ("cpu", "gpu"):
        gpu = rest.pop(0) if kind == "gpu" and rest else ""
        number = rest.pop(0) if rest else "1"
        if slices == 1 and not rest and re.fullmatch(r"[1-9]\d{0,4}", number) and bool(gpu) == (kind == "gpu"):
            return Target(kind, number, gpu=gpu)
    elif re.fullmatch(r"(v\d+\w*|tpu7x)", kind) and len(rest) == 1 and re.fullmatch(r"\d+(x\d+){1,2}", rest[0]):
        return Target(kind, rest[0], slices)
    raise UserError(
        f"--topology is '{text}'{f' with --slices={slices}' if slices > 1 else ''}; it takes a TPU slice such as "
        "v5e:4x4 or v5p:4x4x4, cpu, cpu:8, gpu:h100 or gpu:h100:8; slices are TPUs'"
    )


@dataclasses.dataclass
class CompiledStep:
    """What was found; bytes are of one device."""

    device_kind: str
    devices: int
    chips: int
    mesh: dict[str, int]
    parameters: int
    vocab_rows: int
    flops: float  # model FLOPs of a step, all devices together
    attention: str  # xla or splash
    parameter_bytes: int
    optimizer_bytes: int  # an average of the weights, where one is kept, included
    activation_bytes: int  # kept by the forward pass for the backward pass
    cudnn: bool = False  # on a GPU whose cuDNN has a kernel for it, that is taken instead; it keeps less
    # Of the compiled program; absent where nothing was compiled, or it does not fit.
    compile_seconds: float = 0.0
    argument_bytes: int = 0
    temporary_bytes: int = 0  # beside the arguments, when most is in use
    traffic: int = 0  # bytes read from and written to memory in a step
    matmul_flops: float = 0.0  # of a step, recomputed ones included, those of Pallas kernels not
    fusions: int = 0  # that a step executes
    copies: int = 0
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    error: str = ""  # the compiler's, if the step does not fit

    @property
    def compiled(self) -> bool:
        return self.argument_bytes > 0

    @property
    def matmul_ratio(self) -> float:
        """FLOPs in the program's matmuls over those of the model: above 1 where something is computed again."""
        return self.matmul_flops * self.devices / self.flops

    @property
    def least_bytes(self) -> int:
        """What a device holds at the end of the forward pass as it is written. The compiler may do with less: it
        recomputes some of it, and keeps masks in fewer bits."""
        return self.parameter_bytes + self.optimizer_bytes + self.activation_bytes

    @property
    def total_bytes(self) -> int:
        return self.argument_bytes + self.temporary_bytes


def rehearse(config: Config, vocab_size: int, target: Target, compiles: bool = True) -> CompiledStep:
    """Lowers the train step for the target's devices and, where asked, compiles it.

    Raises:
      UserError: there are no such devices, or config and devices do not go together, or libtpu is missing.
      Failure: the compiler failed, for another reason than memory.
    """
    if target.is_tpu and importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={target.kind}:... needs the TPU compiler; pip install -r {_EXTRA}")
    asked = {
        "config": config.to_dict(),
        "vocab_size": vocab_size,
        "target": target._asdict(),
        "compiles": compiles and target.kind != "gpu",
    }
    env = dict(os.environ) | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it takes no TPU, and so leaves nothing to others
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))),
    }
    if not target.is_tpu:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={target.shape}".strip()
    done = subprocess.run(
        [sys.executable, "-m", "flax_mlm.planning.compile"],
        input=json.dumps(asked),
        env=env,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise Failure(f"the compiler failed ({done.returncode}): {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    answer = json.loads(lines[-1])
    if "user_error" in answer:
        raise UserError(answer["user_error"])
    return CompiledStep(**answer)


def _child(asked: dict[str, Any]) -> dict[str, Any]:
    phase = phases.parse_phases(build(from_dict(asked["config"])))[0]
    config, target, vocab_size = phase.config, Target(**asked["target"]), asked["vocab_size"]

    import jax
    import numpy as np

    from flax_mlm.distributed import chips
    from flax_mlm.distributed.batches import abstract_batch
    from flax_mlm.distributed.mesh import check_batch, make_mesh
    from flax_mlm.model.attention.dispatch import resolve_attention, select_kernel
    from flax_mlm.model.attention.xla import xla
    from flax_mlm.model.heads import vocab_rows
    from flax_mlm.planning import hlo
    from flax_mlm.training.step import make_steps

    jax.config.update("jax_compilation_cache_dir", None)
    cudnn = target.kind == "gpu" and resolve_attention(config, "gpu", lambda width: True) == "cudnn"
    if cudnn:  # which cannot even be traced here
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
        phase = phase._replace(config=config)
    devices = _devices(target)
    mesh = make_mesh(config.mesh, devices)
    check_batch(
        "train.global_batch_size", config.train.global_batch_size, mesh, config.train.gradient_accumulation_steps
    )
    if config.train.reproducible:
        check_batch("train.batch_groups", config.train.batch_groups, mesh)
    with jax.set_mesh(mesh):
        steps = make_steps(config, vocab_size, mesh, phase)
        t = config.train
        rows = abstract_batch(t.global_batch_size, config.data.seq_len, mesh, phase.num_steps is None)
        vocab = _abstract_vocabulary(vocab_size, mesh)
        kernel = select_kernel(
            resolve_attention(config, devices[0].platform),
            config.data.seq_len,
            config.model.attention_dropout_rate > 0.0,
        )
        found = CompiledStep(
            device_kind=devices[0].device_kind,
            devices=len(devices),
            chips=chips.count(devices),
            mesh=dict(mesh.shape),
            parameters=sum(x.size for x in jax.tree.leaves(steps.abstract.params)),
            vocab_rows=vocab_rows(config.model, vocab_size),
            flops=steps.flops,
            attention="xla" if kernel is xla else "splash",
            cudnn=cudnn,
            parameter_bytes=_on_one(steps.abstract.params),
            optimizer_bytes=_on_one((steps.abstract.opt_state, steps.abstract.average)),
            activation_bytes=_kept(phase, steps, mesh, vocab),
        )
        if not asked["compiles"]:
            return dataclasses.asdict(found)
        lowered, begin = steps.train.lower(steps.abstract, rows, vocab), time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            found.error = " ".join(str(e).split("\n\n")[0].split())
            return dataclasses.asdict(found)
    found.compile_seconds = time.perf_counter() - begin
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory and text
    found.argument_bytes = memory.argument_size_in_bytes
    found.temporary_bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    if target.is_tpu:  # where it is known; temporaries may lie where something donated was, and do not just add up
        found.temporary_bytes = memory.peak_memory_in_bytes - found.argument_bytes
    program = hlo.Program(text)
    found.traffic, found.matmul_flops = program.traffic(), program.flops()
    found.fusions, found.copies = program.count("fusion"), program.count("copy", "copy-start")
    grid = np.asarray(mesh.devices).reshape(-1)
    for one in program.collectives(found.mesh, target.slices):
        links = _links([grid[i] for i in one.group], target) if target.is_tpu and one.group else 0.0
        found.collectives.append({**one._asdict(), "sent": one.sent, "links": links})
    return dataclasses.asdict(found)


def _devices(target: Target) -> list[Any]:
    import jax

    if not target.is_tpu:
        return jax.devices()
    from jax.experimental import topologies

    name, more = f"{target.kind}:{target.shape}", dict[str, Any]()
    if set(target.shape) <= set("1x"):
        name, more = f"{target.kind}:1x1x1", {"chips_per_host_bounds": [1, 1, 1]}
    if target.kind == "v4":
        more["chip_config_name"] = "megacore"  # one device a chip, as on a TPU VM
    if target.slices > 1:
        more["num_slices"] = target.slices
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices)
    except Exception as e:  # of several kinds, all of which say what is wrong in their first line
        raise UserError(f"--topology={target.kind}:{target.shape}: {str(e).splitlines()[0]}") from e


def _abstract_vocabulary(size: int, mesh: Any) -> Any:
    """Shapes of what masking knows of a vocabulary with five special pieces."""
    import jax
    import numpy as np

    from flax_mlm.objectives.vocabulary import Vocabulary

    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shape(n: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((n,), dtype, sharding=whole)

    return Vocabulary(shape(size, np.bool_), shape(size, np.bool_), shape(size - 5, np.int32), 0, 2, 4)


def _on_one(tree: Any) -> int:
    """Bytes of one device's part."""
    import jax
    import numpy as np

    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _kept(phase: phases.Phase, steps: Any, mesh: Any, vocab: Any) -> int:
    """Bytes that one device keeps from the forward pass of a (micro)batch for the backward pass."""
    import jax

    from flax_mlm.distributed.batches import abstract_batch
    from flax_mlm.distributed.mesh import bind_to_mesh, num_batch_shards
    from flax_mlm.objectives.masking import rates_at
    from flax_mlm.objectives.targets import max_predictions_per_row
    from flax_mlm.training.step import inputs

    config = phase.config

    def forward(params: Any, batch: Any, vocab: Any) -> Any:
        slots = max_predictions_per_row(config.objective, config.data.seq_len, phase.largest_mask_rate)
        targets, keys_B = inputs(config, batch, vocab, rates_at(phase, 0.0), slots)
        counts = steps.loss.counts(targets)
        _, backward = jax.vjp(lambda p: steps.loss.total(steps.loss.predict(p, targets, keys_B), counts)[0], params)
        return backward

    pieces = config.train.batch_groups // num_batch_shards(mesh) if config.train.reproducible else 1
    rows = config.train.global_batch_size // (config.train.gradient_accumulation_steps * pieces)
    batch = abstract_batch(rows, config.data.seq_len, mesh)
    jaxpr = jax.make_jaxpr(forward)(steps.abstract.params, batch, vocab).jaxpr
    given = {id(v) for v in jaxpr.invars}
    kept = {id(v): v.aval for v in jaxpr.outvars if id(v) not in given and hasattr(v.aval, "sharding")}
    arrays = [x for x in kept.values() if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)]
    return _on_one(bind_to_mesh(arrays, mesh))


def _links(group: list[Any], target: Target) -> float:
    """How many links each chip of a group can send through at once: along each dimension of the slice that the group
    spans, both ways if the dimension is a ring, else one. Of a group that takes every n-th chip of a line, n groups
    share the links. 0: the group is of cores of one chip."""
    from flax_mlm.distributed import chips

    chip = chips.of_kind(group[0].device_kind)
    shape = [int(n) for n in target.shape.split("x")]
    links = 0.0
    for dimension, places in enumerate(zip(*(device.coords for device in group), strict=True)):
        taken = sorted(set(places))
        if len(taken) > 1:
            length = shape[dimension] if dimension < len(shape) else 1
            among = shape if chip and chip.together else [length]
            rings = chip is not None and len(taken) == length and all(n % chip.wraps == 0 for n in among)
            links += (2 if rings else 1) * (len(taken) - 1) / (taken[-1] - taken[0])
    return links


if __name__ == "__main__":
    try:
        result = _child(json.load(sys.stdin))
    except UserError as e:
        result = {"user_error": str(e)}
    print(json.dumps(result))
