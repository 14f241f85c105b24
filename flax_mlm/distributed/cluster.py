"""Where the processes of a run are: settings, environment variables, or what JAX detects."""

import dataclasses
import os

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
        from flax_mlm.distributed import coordination

        try:
            address, count, index = coordination.detect(address, count, index, cluster.initialization_timeout)
        except Exception as e:
            raise UserError(
                f"the settings of this cluster cannot be read ({type(e).__name__}: {e}); give --coordinator, "
                "--num_processes and --process_id, or --num_processes=1"
            ) from e
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
