"""A model with its parameters, tokenizer and devices: the input of every function that computes something with it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jax.sharding import Mesh

from flax_mlm.config.schema import Config
from flax_mlm.data.tokenizer.base import Tokenizer
from flax_mlm.inference.forward import Forward
from flax_mlm.objectives.rows import Vocabulary

_LENGTH_MULTIPLE = 32


class LoadedModel(NamedTuple):
    """A model with its parameters on a mesh. Use it under `jax.set_mesh(mesh)`."""

    config: Config
    mesh: Mesh
    forward: Forward
    params: Any
    tokenizer: Tokenizer
    vocab: Vocabulary
    meta: Mapping[str, Any] = MappingProxyType({})  # of the checkpoint; empty for a Hugging Face folder

    @property
    def row_length(self) -> int:
        """Tokens of the rows that it was trained on; of a Hugging Face folder, all positions count as trained."""
        return self.config.model.max_positions if self.config.init_from else self.config.data.seq_len

    @property
    def max_length(self) -> int:
        """Tokens that a text may have: learned positions beyond the rows of the training were never trained."""
        model = self.config.model
        return self.row_length if model.position_embedding == "learned" else model.max_positions

    def padded_length(self, length: int) -> int:
        """Rounds the length of a batch up to one of a few lengths, since each is compiled."""
        return min(-(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, self.config.model.max_positions)
