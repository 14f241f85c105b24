"""Addresses of the processes of a run: settings, environment variables, or what JAX detects; GPUs of a Slurm task."""

import dataclasses
import os
import re
from collections.abc import Mapping

from flax_mlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """How the processes of one run find and watch each other; by default they are detected, or there is only one.

    Attributes:
      coordinator: HOST:PORT of process 0, which listens there and on the next port; empty: from
        JAX_COORDINATOR_ADDRESS, or detected.
      num_processes: number of processes; 0: from JAX_NUM_PROCESSES, or detected.
      process_id: index of this process, from 0; -1: from JAX_PROCESS_ID, or detected.
      initialization_timeout: seconds to wait until all processes have connected.
      heartbeat: seconds without a heartbeat after which a process counts as lost.
    """

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    initialization_timeout: int = 600
    heartbeat: int = 15


def resolve(cluster: ClusterConfig) -> tuple[str, int, int]:
    """Returns the address of process 0 (empty if it is alone), the number of processes, and the index of this one.

    Each comes from `cluster`, else from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, else from what
    JAX detects (TPU slice, Slurm, Open MPI, Kubernetes).

    Raises:
      UserError: the settings are incomplete or contradict each other.
    """
    address: str | None = cluster.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    count = cluster.num_processes or _integer("JAX_NUM_PROCESSES")
    index = cluster.process_id if cluster.process_id >= 0 else _integer("JAX_PROCESS_ID")
    if count != 1 and (address is None or count is None or index is None):
        try:
            from jax._src.clusters import ClusterEnv  # as jax.distributed.initialize does

            detect, timeout = ClusterEnv.auto_detect_unset_distributed_params, cluster.initialization_timeout
            address, count, index, *_ = detect(address, count, index, [], None, timeout)
        except Exception as e:
            what = f"the settings of this cluster cannot be read ({type(e).__name__}: {e})"
            options = "--coordinator, --num_processes and --process_id, or --num_processes=1"
            raise UserError(f"{what}; give {options}") from e
    if count == 1 and index:
        raise UserError(out_of_range(index, count))
    if count == 1 or (address is None and count is None and index is None):
        return "", 1, 0
    if address is None or count is None or index is None:
        raise UserError("several processes need all of --coordinator, --num_processes and --process_id")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is '{address}'; expected HOST:PORT of process 0")
    return address, count, index


def out_of_range(index: int, count: int, whose: str = "") -> str:
    """Formats the error for an index that no process of the run can have."""
    return f"--process_id is {index}{whose}; with --num_processes={count} expected 0 to {count - 1}"


def _integer(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text and not text.isdecimal():
        raise UserError(f"{variable} is '{text}'; expected a whole number")
    return int(text) if text else None


def slurm_gpus(env: Mapping[str, str]) -> list[int] | None:
    """Local GPU indices of this Slurm task, among the GPUs it can see; None: all of them.

    Every task of a node gets an equal part of the node's GPUs. JAX alone would give each task the one GPU of its
    number, and so leave a single task on a node with only the first.

    Args:
      env: the task's environment; SLURM_* and CUDA_VISIBLE_DEVICES are read.

    Raises:
      UserError: the node's GPUs do not divide evenly among its tasks.
    """
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))  # 8(x2),4
    tasks_per_node = [int(tasks) for tasks, nodes in counts for _ in range(int(nodes or 1))]
    tasks = tasks_per_node[int(env.get("SLURM_NODEID", "0"))] if tasks_per_node else 1
    visible = len([gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu])
    on_node = int(env.get("SLURM_GPUS_ON_NODE") or visible)
    divided_by_slurm = 0 < visible < on_node  # --gpus-per-task
    if tasks == 1 or on_node == 0 or divided_by_slurm:
        return None
    if on_node % tasks:
        what = f"--ntasks-per-node is {tasks}, with {on_node} GPUs on a node"
        raise UserError(f"{what}; expected 1 or a divisor of {on_node}")
    per_task = on_node // tasks
    first = int(env.get("SLURM_LOCALID", "0")) * per_task
    return list(range(first, first + per_task))
