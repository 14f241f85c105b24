"""A model with its parameters and everything needed to ask it something: what tasks and `fill_mask` work on."""

import dataclasses
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from flax_mlm.checkpoint.format import Damaged, find_checkpoints, read_meta, stored_tokenizer
from flax_mlm.checkpoint.format import restore as restore_items
from flax_mlm.config.schema import Config
from flax_mlm.data.tokenizer.base import Tokenizer
from flax_mlm.data.tokenizer.load import load_tokenizer
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.errors import UserError
from flax_mlm.hf import folder as folder_lib
from flax_mlm.hf import weights as start
from flax_mlm.model import electra
from flax_mlm.objectives.vocabulary import Vocabulary
from flax_mlm.training.step import Steps, make_steps

_LENGTH = 32


class LoadedModel(NamedTuple):
    """A model on a mesh. Use it under `jax.set_mesh(mesh)`."""

    config: Config
    mesh: Mesh
    steps: Steps
    params: Any
    tokenizer: Tokenizer
    vocab: Vocabulary
    meta: Mapping[str, Any] = MappingProxyType({})  # of the checkpoint it was restored from

    @property
    def row_length(self) -> int:
        """Tokens of the rows that it was trained on: of a Hugging Face folder all positions are trained."""
        return self.config.model.max_positions if self.config.init_from else self.config.data.seq_len

    @property
    def max_length(self) -> int:
        """Tokens that a text may have: learned positions beyond the rows of its training were never trained."""
        model = self.config.model
        return self.row_length if model.position_embedding == "learned" else model.max_positions

    def padded_length(self, length: int) -> int:
        """To which rows of so many tokens are padded: few lengths, since each one is compiled."""
        return min(-(-length // _LENGTH) * _LENGTH, self.config.model.max_positions)


def restore(path: str, config: Config) -> LoadedModel:
    """The model of the newest sound checkpoint that `path` may mean (see `find_checkpoints`), or of a Hugging Face
    folder, from that alone. Nothing is written.

    Args:
      path: what the user gave as --checkpoint.
      config: the one stored in it, overrides applied.

    Raises:
      UserError: there is none, or none that is sound and fits the config.
    """
    mesh = make_mesh(config.mesh)
    if folder_lib.is_one(path):
        tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.extra_tokens_file)
        with jax.set_mesh(mesh):
            steps = make_steps(config, tokenizer.vocab_size, mesh)
            params = start.state(config, steps, tokenizer, lambda line: print(line, file=sys.stderr)).params
            return LoadedModel(config, mesh, steps, params, tokenizer, Vocabulary.from_tokenizer(tokenizer))
    candidates, wanted = find_checkpoints(path), None
    for folder in candidates:
        try:
            meta = read_meta(folder)
            phase = meta.get("phase", 0)
            if phase != (wanted := phase if wanted is None else wanted):
                raise UserError(f"checkpoint '{folder}' is of another phase of the run; name its step to use it")
            tokenizer = stored_tokenizer(meta)
            with jax.set_mesh(mesh):
                steps = make_steps(config, tokenizer.vocab_size, mesh)
                # A fine-tuned encoder began with the average, and keeps none.
                item = "average" if config.optimizer.averages != "none" and "fine_tuned" not in meta else "params"
                items = restore_items(folder, meta, {item: steps.abstract.params}, steps.fingerprint)
                model = LoadedModel(
                    config, mesh, steps, items[item], tokenizer, Vocabulary.from_tokenizer(tokenizer), meta
                )
                return untied(model) if config.objective.name == "rtd" else model
        except Damaged as e:
            if folder == candidates[-1]:
                raise
            print(f"{e}; using the one before", file=sys.stderr)
    raise AssertionError


def untied(model: LoadedModel) -> LoadedModel:
    """The same generator and discriminator, each with embeddings of its own, so that the encoder is whole."""
    config, sharing = model.config, model.config.objective.embedding_sharing
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, embedding_sharing="none"))
    steps = make_steps(config, model.tokenizer.vocab_size, model.mesh)
    return model._replace(config=config, steps=steps, params=electra.untied(model.params, sharing))
