"""A model with its parameters and everything needed to ask it something: what tasks and `fill_mask` work on."""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from flax_mlm import checkpoint, masking, sharding
from flax_mlm.config import Config
from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.step import Steps, make_steps


class Trained(NamedTuple):
    """A model on a mesh. Use it under `jax.set_mesh(mesh)`."""

    config: Config
    mesh: Mesh
    steps: Steps
    params: Any
    tokenizer: Tokenizer
    vocab: masking.Vocabulary


def restore(path: str, config: Config) -> Trained:
    """The model of a checkpoint (see `checkpoint.find`), from the checkpoint alone.

    Args:
      path: what the user gave as --checkpoint.
      config: the one stored in it, overrides applied.
    """
    folder = checkpoint.find(path)
    tokenizer = checkpoint.read_tokenizer(folder)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        steps = make_steps(config, tokenizer.vocab_size, mesh)
        params = checkpoint.restore_params(folder, steps.abstract.params)
        return Trained(config, mesh, steps, params, tokenizer, masking.vocabulary(tokenizer))
