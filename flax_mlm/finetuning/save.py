"""Saving a fine-tuned encoder as a checkpoint."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mlm.checkpoint.format import make_meta
from flax_mlm.checkpoint.manager import Checkpoints
from flax_mlm.inference.model import LoadedModel
from flax_mlm.storage import gcs


class FineTuned(NamedTuple):
    """Fine-tuned weights without optimizer state, and the pretraining step that they started from."""

    params: Any
    step: jax.Array


def save_encoder(workdir: gcs.AnyPath, model: LoadedModel, encoder: Any, examples: int) -> None:
    """Saves an encoder fine-tuned for vectors as a checkpoint, enough to evaluate, embed and export.

    Args:
      workdir: a new folder.
      model: the model that was fine-tuned; its parameters other than the encoder's are kept.
      encoder: the fine-tuned parameters.
      examples: number of training pairs.

    Raises:
      Failure: it cannot be written.
    """
    before = model.meta
    meta = make_meta(model.config, model.tokenizer, before.get("corpus", ""), before.get("text", {}))
    meta["fine_tuned"] = {"examples": examples}
    config = dataclasses.replace(model.config, train=dataclasses.replace(model.config.train, max_failed_saves=1))
    step = before.get("step", 0)
    checkpoints = Checkpoints(workdir, config, meta, model.forward.fingerprint)
    state = FineTuned({**model.params, "encoder": encoder}, jnp.int32(step))
    checkpoints.save(step, state, run_meta={"totals": before.get("totals", {})})
    checkpoints.close()
