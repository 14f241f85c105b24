"""TensorFlow, which runs the input pipeline on the CPU and nothing else."""

import functools
import os
from typing import Any


@functools.cache
def tensorflow() -> Any:
    """Imports TensorFlow with its log silenced and the accelerators hidden from it: they belong to JAX."""
    # TF_ENABLE_ONEDNN_OPTS=0 drops a log line about rounding that the log level does not silence.
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf
