"""Saves what was fine-tuned as a checkpoint, enough to evaluate, embed, predict and export."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flax_mlm.checkpoint.format import make_meta
from flax_mlm.checkpoint.manager import Checkpoints
from flax_mlm.checkpoint.store import check_name
from flax_mlm.errors import UserError
from flax_mlm.inference.load import LoadedModel, Params
from flax_mlm.inference.task_head import TaskHead
from flax_mlm.storage import files, gcs


def new_folder(save: str, train: str, method: str = "full") -> Path | None:
    """Returns the folder that `--save` names, None where it is empty.

    Args:
      train: value of `--train`.
      method: `finetune.method`.

    Raises:
      UserError: the folder exists or cannot be made, or nothing is fine-tuned.
    """
    if not save:
        return None
    folder = Path(save).expanduser()
    if folder.exists():
        raise UserError(f"--save is '{save}', which exists; name a new folder")
    if not train:
        expected = "expected data to fine-tune on; without it there is nothing new for --save"
        raise UserError(f"--train is missing; {expected}")
    if method == "probe":
        raise UserError("finetune.method is probe, which trains no encoder for --save; use full, or leave out --save")
    check_name("--save", folder.absolute())
    files.check_writable("--save", folder, makes_folders=True)
    return folder


def save_model(
    workdir: gcs.AnyPath, model: LoadedModel, params: Params, examples: int, head: TaskHead | None = None
) -> None:
    """Saves a fine-tuned encoder with its head as a checkpoint.

    Args:
      workdir: a new folder.
      model: the model that was fine-tuned; its parameters other than the encoder's are kept.
      params: dict of the fine-tuned parameters of the encoder, `encoder`, and of the head, `task`.
      examples: number of training examples.
      head: what `params["task"]` predicts; None for an encoder without a head.

    Raises:
      Failure: it cannot be written.
    """
    before = model.meta
    meta = make_meta(model.config, model.tokenizer, before.get("corpus", ""), before.get("text", {}))
    meta["fine_tuned"] = {"examples": examples, **(head.about() if head else {})}
    if model.missing_head:
        meta["fine_tuned"]["missing_head"] = str(model.missing_head)
    config = dataclasses.replace(model.config, train=dataclasses.replace(model.config.train, max_failed_saves=1))
    step = before.get("step", 0)
    checkpoints = Checkpoints(workdir, config, meta)
    whole = NamedSharding(model.mesh, PartitionSpec())  # on all devices, as the parameters are
    state = _FineTuned({**model.params, **params}, jax.device_put(np.int32(step), whole))
    checkpoints.save(step, state, totals=before.get("totals", {}))
    checkpoints.close()


class _FineTuned(NamedTuple):
    """Fine-tuned weights without optimizer state, and the pretraining step that they started from."""

    params: Any
    step: jax.Array
