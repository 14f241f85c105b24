"""TensorFlow, which runs the input pipeline on the CPU and nothing else; and the datasets that TFDS has prepared."""

import functools
import os
import re
from typing import Any

from etils import epath

from flax_mlm.errors import UserError, as_user_error


@functools.cache
def tensorflow() -> Any:
    """Imports TensorFlow with its log silenced and the accelerators hidden from it: they belong to JAX."""
    # TF_ENABLE_ONEDNN_OPTS=0 drops a log line about rounding that the log level does not silence.
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf


def prepared_tfds(error_prefix: str, spec: str) -> tuple[Any, str]:
    """Opens a dataset in TFDS_DATA_DIR without asking the network.

    Args:
      error_prefix: first words of an error.
      spec: NAME[/config][:version][:split]; default split train.

    Returns:
      The dataset's builder, and the split.

    Raises:
      UserError: the dataset is not prepared, or has no such split.
    """
    match = re.fullmatch(r"(?P<name>[^:\[\]]+(?::\d+\.\d+\.\d+)?)(?::(?P<split>[^:].*))?", spec)
    if not match:
        raise UserError(f"{error_prefix}; write tfds:NAME[/config][:version][:split]")
    name, split = match["name"], match["split"] or "train"
    data_dir = os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    remedy = f"prepare it with `tfds build {name} --data_dir={data_dir}` on a machine with a network"
    missing = UserError(f"{error_prefix}; '{name}' is not prepared in {data_dir} (TFDS_DATA_DIR); {remedy}")
    if not (epath.Path(data_dir) / name.split(":")[0]).is_dir():  # before the slow imports
        raise missing
    tensorflow()
    with as_user_error(f"{error_prefix}; `pip install tensorflow-datasets importlib_resources`: ", ImportError):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import read_only_builder
    try:
        # Reads files only. `tfds.load` would ask the network for minutes about a dataset that is missing.
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as e:
        raise missing from e
    try:
        _ = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as e:
        raise UserError(f"{error_prefix}; its splits are {', '.join(builder.info.splits)}") from e
    return builder, split
