"""flax_mlm: masked-language-model pretraining in JAX/Flax, from text to an exported encoder.

From Python: `flax_mlm.load(path)` gives a trained model (see `inference.api`). The commands are the files of this
folder: `python -m flax_mlm.train` and so on. The folders are what they are made of; each imports only from folders on
its left:

    errors < config, storage < data, distributed < checkpoint, hf, model, optim < objectives < inference < finetuning
           < evaluation < training < cli, planning < commands
"""

from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Imports `load` at its first use: importing the package imports neither JAX nor anything else that is heavy."""
    if name != "load":
        raise AttributeError(f"module 'flax_mlm' has no attribute '{name}'")
    from flax_mlm.distributed import environment

    environment.prepare()  # before JAX starts its backend
    from flax_mlm.inference.api import load

    return load
