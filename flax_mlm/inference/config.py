"""The config of a checkpoint or of a Hugging Face folder."""

import dataclasses
from collections.abc import Mapping, Set
from typing import Any

from ml_collections import ConfigDict

from flax_mlm.checkpoint.format import newest_meta, stored_config
from flax_mlm.config.load import from_dict
from flax_mlm.config.schema import Config
from flax_mlm.data.tokenizer import load_tokenizer
from flax_mlm.errors import UserError
from flax_mlm.hf import sentence_transformers, task_heads
from flax_mlm.hf.folder import Folder, is_hf_folder, open_folder, read_json
from flax_mlm.storage import hub

# For a new vocabulary head, and for one that the folder has. A new head whose gradients reach the encoder at once costs
# all-MiniLM-L6-v2 0.037 of its Spearman on STS-B in 200 steps, and learns more slowly (docs/how-to/huggingface.md).
_HEAD = {"head_first_steps": (50, 0), "head_rate_factor": (20.0, 1.0)}


def read_config(path: str, overrides: Mapping[str, Any] = {}) -> ConfigDict:
    """Reads the config of a checkpoint, with a mesh that fits these devices, or makes that of a Hugging Face folder.

    Args:
      path: the workdir of a run (its newest sound checkpoint), WORKDIR@STEP, the folder of one checkpoint, a Hugging
        Face folder, or `hf:ORG/NAME[@revision]`, a model of the hub.
      overrides: field -> value.

    Raises:
      UserError: there is no such checkpoint, or the folder cannot be used (see `apply_folder`).
    """
    if is_hf_folder(path):
        config = from_dict({"init_from": hub.pin("--checkpoint", path)})
        config.update_from_flattened_dict(overrides)
        apply_folder(config, overrides.keys(), as_is=True)
    else:
        config = stored_config(newest_meta(path)[1])
        config.mesh.update(data=-1, fsdp=1, tensor=1)
        config.update_from_flattened_dict(overrides)
    return config


def pin_hub_names(config: ConfigDict) -> None:
    """Puts the commits of models of the hub (`hf:ORG/NAME`) into the names that a config has of them."""
    config.init_from = hub.pin("init_from", config.init_from)
    config.tokenizer.path = hub.pin("tokenizer.path", config.tokenizer.path, weights=False)


def pinned(config: Config) -> Config:
    """Returns a config whose names of models of the hub have their commits. See `pin_hub_names`."""
    tokenizer = hub.pin("tokenizer.path", config.tokenizer.path, weights=False)
    start = hub.pin("init_from", config.init_from)
    return dataclasses.replace(config, init_from=start, tokenizer=dataclasses.replace(config.tokenizer, path=tokenizer))


def usual_learning_rate(hidden_size: int) -> float:
    """The peak learning rate at which a pretrained encoder of this width is trained further."""
    return 5e-5 if hidden_size >= 384 else 1e-4


def _max_length(folder: Folder, limit: int) -> int:
    """Returns the tokens that a text may have in a folder with a task's head: as many as its tokenizer allows."""
    file = folder.path / "tokenizer_config.json"
    length = read_json(file).get("model_max_length") if file.exists() else None
    return min(length, limit) if type(length) is int and length > 3 else limit


def apply_folder(config: ConfigDict, given: Set[str] = frozenset(), as_is: bool = False) -> None:
    """Sets the fields that `config.init_from`, a Hugging Face folder or a model of the hub, determines.

    These are the shape of the model, and unless the user has set them the tokenizer, the length of rows where it is
    longer than the model can read, and how vectors are made. A length of rows and settings of the optimizer that are
    None become what is usual for the model.

    Args:
      given: names of the fields that the user has set.
      as_is: the model is not trained further: its objective is that of its architecture.

    Raises:
      UserError: the folder cannot be used, or the user has set a field to something else.
    """
    pin_hub_names(config)
    folder = open_folder(config.init_from)
    for name, value in folder.model_fields.items():
        if f"model.{name}" in given and (own := config.model[name]) != value:
            raise UserError(f"model.{name} is {own}, but {value} in '{folder.path}' (init_from); leave it out")
        config.model[name] = value
    if as_is and "objective.name" not in given:
        config.objective.name = folder.architecture.objective
    if not config.tokenizer.path:
        config.tokenizer.path = config.init_from
    tokenizer = load_tokenizer(config.tokenizer.path)
    folder.check_tokenizer(tokenizer)
    limit = config.model.max_positions
    if "data.seq_len" not in given or config.data.seq_len is None:
        config.data.seq_len = min(config.data.seq_len or 512, limit)
    if config.optimizer.learning_rate is None:
        config.optimizer.learning_rate = usual_learning_rate(config.model.hidden_size)
    for name, (new, old) in _HEAD.items():
        if config.optimizer[name] is None:
            config.optimizer[name] = new if config.reinit_head else old
    fields, unsupported = sentence_transformers.read(folder.path, tokenizer, limit, config.finetune.max_length)
    if as_is and unsupported and not task_heads.describe(folder) and "finetune.pooling" not in given:
        problem = f"'{folder.path}' makes vectors with {', '.join(unsupported)}, which our encoder does not compute"
        raise UserError(f"{problem}; set finetune.pooling to use the encoder without it")
    if as_is and (head := task_heads.describe(folder)):
        fields = {**fields, "pooling": head["pooling"], "max_length": _max_length(folder, limit)}
    config.finetune.update({name: value for name, value in fields.items() if f"finetune.{name}" not in given})
    rows = folder.config["vocab_size"]
    if config.tokenizer.extra_tokens_file:
        rows = max(rows, load_tokenizer(config.tokenizer.path, config.tokenizer.extra_tokens_file).vocab_size)
    # The embedding keeps all its rows, also those without a token.
    config.model.vocab_multiple_of *= -(-rows // config.model.vocab_multiple_of)
