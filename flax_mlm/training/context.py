"""Parts of a run that stay the same from its first step to its last."""

import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh

from flax_mlm.config.phases import Phase
from flax_mlm.config.schema import Config
from flax_mlm.data.mixture import Mixture
from flax_mlm.distributed.preemption import Stop
from flax_mlm.distributed.processes import ProcessGroup
from flax_mlm.storage.gcs import AnyPath
from flax_mlm.storage.lease import Lease
from flax_mlm.training.budget import Budget


@dataclasses.dataclass(frozen=True)
class RunContext:
    """A run's config, data, devices and files, as one process has them.

    Attributes:
      phases: those of `config`.
      mixtures: the corpora of each phase.
      log: prints on process 0, and nothing elsewhere.
      lease, budget: of process 0 alone; `budget` only where the clock ends the run.
    """

    config: Config
    workdir: AnyPath
    phases: list[Phase]
    mixtures: list[Mixture]
    mesh: Mesh
    group: ProcessGroup
    stop: Stop
    log: Callable[[str], None]
    lease: Lease | None
    budget: Budget | None
