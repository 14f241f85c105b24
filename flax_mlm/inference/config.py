"""The config of a checkpoint."""

from ml_collections import ConfigDict

from flax_mlm.checkpoint.format import newest_meta, stored_config


def read_config(path: str) -> ConfigDict:
    """Returns the config of the newest sound checkpoint that `path` may mean, with a mesh that fits these devices.

    Args:
      path: the workdir of a run, WORKDIR@STEP, or the folder of one checkpoint.

    Raises:
      UserError: there is no such checkpoint.
    """
    config = stored_config(newest_meta(path)[1])
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 1, 1
    return config
