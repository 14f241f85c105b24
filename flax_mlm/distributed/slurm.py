"""GPUs of a Slurm task."""

import re
from collections.abc import Mapping

from flax_mlm.errors import UserError


def gpus_of_task(env: Mapping[str, str]) -> list[int] | None:
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
        raise UserError(
            f"--ntasks-per-node is {tasks}, with {on_node} GPUs on a node; expected 1 or a divisor of {on_node}"
        )
    per_task = on_node // tasks
    first = int(env.get("SLURM_LOCALID", "0")) * per_task
    return list(range(first, first + per_task))
