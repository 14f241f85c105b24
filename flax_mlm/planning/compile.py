"""Compiles the train step for devices that are not present, to measure its memory, collectives and FLOPs.

The TPU compiler needs no TPU, but its own environment variables, and some of its failures end the process. So
`compile_step_for` runs `python -m flax_mlm.planning.worker`, which reads a JSON request and prints a JSON answer.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from flax_mlm.config.schema import Config
from flax_mlm.errors import Failure, UserError


class Target(NamedTuple):
    """Devices to compile for, as the user names them: v5e:4x4, cpu, cpu:8, gpu:h100, gpu:h100:8."""

    kind: str  # cpu, gpu, or the generation of the TPU
    shape: str  # shape of a TPU slice, else the number of devices
    slices: int = 1
    gpu: str = ""

    def __str__(self) -> str:
        name = ":".join(filter(None, (self.kind, self.gpu, self.shape)))
        return name if self.slices == 1 else f"{name} × {self.slices} slices"

    @property
    def is_tpu(self) -> bool:
        return self.kind not in ("cpu", "gpu")


def parse_target(text: str, slices: int = 1) -> Target:
    """Parses `--topology` and `--slices`. Raises UserError."""
    kind, *rest = text.split(":")
    if kind in ("cpu", "gpu"):
        gpu = rest.pop(0) if kind == "gpu" and rest else ""
        number = rest.pop(0) if rest else "1"
        if slices == 1 and not rest and re.fullmatch(r"[1-9]\d{0,4}", number) and bool(gpu) == (kind == "gpu"):
            return Target(kind, number, gpu=gpu)
    elif re.fullmatch(r"(v\d+\w*|tpu7x)", kind) and len(rest) == 1 and re.fullmatch(r"\d+(x\d+){1,2}", rest[0]):
        return Target(kind, rest[0], slices)
    given = f"'{text}'" + f" with --slices={slices}" * (slices > 1)
    expected = "a TPU slice such as v5e:4x4 or v5p:4x4x4, cpu, cpu:8, gpu:h100 or gpu:h100:8; only TPUs have slices"
    raise UserError(f"--topology is {given}; expected {expected}")


@dataclasses.dataclass
class CompiledStep:
    """Measurements of a train step; bytes are of one device."""

    device_kind: str
    devices: int
    chips: int
    mesh: dict[str, int]
    parameters: int
    vocab_rows: int
    flops: float  # model FLOPs of a step, all devices together
    attention: str  # xla or splash
    parameter_bytes: int
    optimizer_bytes: int  # optimizer state, and the average of the weights where there is one
    activation_bytes: int  # kept by the forward pass for the backward pass
    cudnn: bool = False  # the target's cuDNN kernel replaces `attention`, and keeps less
    # Measured on the compiled program; absent where nothing was compiled, or where it does not fit.
    compile_seconds: float = 0.0
    argument_bytes: int = 0
    temporary_bytes: int = 0  # peak of what is not an argument
    traffic: int = 0  # bytes of main memory read and written in a step
    matmul_flops: float = 0.0  # of a step, with recomputation, without Pallas kernels
    fusions: int = 0  # executed in a step
    copies: int = 0
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    error: str = ""  # the compiler's message where the step does not fit

    @property
    def compiled(self) -> bool:
        return self.argument_bytes > 0

    @property
    def matmul_ratio(self) -> float:
        """FLOPs of the program's matmuls over those of the model: above 1 with recomputation."""
        return self.matmul_flops * self.devices / self.flops

    @property
    def least_bytes(self) -> int:
        """Bytes of a device at the end of the forward pass, before the compiler recomputes or packs any of it."""
        return self.parameter_bytes + self.optimizer_bytes + self.activation_bytes

    @property
    def total_bytes(self) -> int:
        return self.argument_bytes + self.temporary_bytes


def compile_step_for(config: Config, vocab_size: int, target: Target, compiles: bool = True) -> CompiledStep:
    """Traces the train step for the target's devices and, with `compiles`, compiles it (never for a GPU).

    Raises:
      UserError: the target does not exist, config and target do not fit together, or libtpu is missing.
      Failure: the compiler failed, for another reason than memory.
    """
    if target.is_tpu and importlib.util.find_spec("libtpu") is None:
        install = "pip install -r launch/tpu-requirements.txt"
        raise UserError(f"--topology={target.kind}:... needs the TPU compiler; {install}")
    env = dict(os.environ) | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it uses no TPU, so that it locks none either
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))),
    }
    if not target.is_tpu:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={target.shape}".strip()
    request = json.dumps([config.to_dict(), vocab_size, target, compiles and target.kind != "gpu"])
    worker = [sys.executable, "-m", "flax_mlm.planning.worker"]
    done = subprocess.run(worker, input=request, env=env, capture_output=True, text=True, errors="replace")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise Failure(f"the compiler failed ({done.returncode}): {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    answer = json.loads(lines[-1])
    if "user_error" in answer:
        raise UserError(answer["user_error"])
    return CompiledStep(**answer)
