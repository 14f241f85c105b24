"""Flags of the commands that run as several processes."""

from dataclasses import fields

from absl import flags

from flax_mlm.distributed.cluster import ClusterConfig

flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0; empty: detected (TPU, Slurm, Open MPI)")
flags.DEFINE_integer("num_processes", 0, "number of processes; 0: detected, else 1", lower_bound=0)
flags.DEFINE_integer("process_id", -1, "index of this process, from 0; -1: detected", lower_bound=-1)
flags.DEFINE_integer("initialization_timeout", 600, "seconds to wait until all processes have connected", lower_bound=1)
flags.DEFINE_integer("heartbeat", 15, "seconds without a heartbeat after which a process counts as lost", 1, 300)


def from_flags() -> ClusterConfig:
    """Cluster settings of the command line, where each flag is a field of them."""
    return ClusterConfig(**{field.name: getattr(flags.FLAGS, field.name) for field in fields(ClusterConfig)})
