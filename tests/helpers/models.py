"""Models of runs, loaded for evaluation."""

from pathlib import Path

from flax_mlm.config.load import build
from flax_mlm.inference.config import read_config
from flax_mlm.inference.load import LoadedModel, load_model


def load_on_8_devices(run: Path) -> LoadedModel:
    """Loads the newest checkpoint on a mesh of 4 × 2."""
    c = read_config(str(run))
    c.mesh.data, c.mesh.fsdp = 4, 2
    return load_model(str(run), build(c))
