"""Flags of the commands that run as several processes."""

from absl import flags

from flax_mlm.distributed.cluster import ClusterConfig

_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0; empty: detected (TPU, Slurm, Open MPI)")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "number of processes; 0: detected, else 1", lower_bound=0)
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "index of this process, from 0; -1: detected", lower_bound=-1)
_TIMEOUT = flags.DEFINE_integer(
    "initialization_timeout", 600, "seconds to wait until all processes have connected", lower_bound=1
)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat", 15, "seconds without a heartbeat after which a process counts as lost", lower_bound=1, upper_bound=300
)


def from_flags() -> ClusterConfig:
    """Cluster settings of the command line."""
    return ClusterConfig(
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        initialization_timeout=_TIMEOUT.value,
        heartbeat=_HEARTBEAT.value,
    )
