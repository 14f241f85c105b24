"""Export: a checkpoint as a Hugging Face folder that transformers loads."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes

from flax_mlm.checkpoint.format import find_checkpoints
from flax_mlm.checkpoint.store import saved_steps
from flax_mlm.config.schema import Config
from flax_mlm.errors import UserError
from flax_mlm.hf import folder, model_card, sentence_transformers, task_heads, tokenizer_json, weights
from flax_mlm.hf.architecture import Architecture
from flax_mlm.inference.load import LoadedModel, load_model
from flax_mlm.model import electra, heads
from flax_mlm.storage import files, gcs


def export(
    path: str,
    output: Path,
    config: Config,
    architecture: str = "",
    dtype: str = "float32",
    licence: str = "",
    language: str = "",
    complete: Callable[[Path, LoadedModel], Any] = lambda folder, model: None,
) -> LoadedModel:
    """Writes a Hugging Face folder, complete or not at all.

    Args:
      path: as for `load_model`, and `config`.
      output: the folder to create.
      architecture: model_type of a class in transformers; empty: that of the folder, or the first one that fits.
      dtype: of the weights, float32 or bfloat16.
      licence, language: of the model, for its card, as Hugging Face spells them; empty: not stated.
      complete: adds files to the folder while it has a temporary name; where it raises, nothing is written.

    Returns:
      The model that was written, its weights rounded to `dtype`, and computed in float32.

    Raises:
      UserError: transformers has no class for this encoder; or the folder exists or cannot be written.
    """
    output = output.expanduser().absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output: '{output}' exists; name another folder, or delete that one")
    model = load_model(path, dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32")))
    if not model.task_head:
        model.require_head()
    if dtype == "bfloat16":
        model = _rounded_model(model, dtype)

    m, tokenizer, head = config.model, model.tokenizer, model.task_head
    if not (architecture or model.meta):  # a folder keeps its own
        architecture = folder.open_folder(config.init_from).architecture.model_type

    def refusal(architecture: Architecture) -> str:
        return task_heads.refusal(architecture, head.about(), config.finetune.pooling) if head else ""

    cls_token = tokenizer.tokens[tokenizer.cls_id]
    chosen = folder.matching_architecture(m, config.objective.name, architecture, cls_token, refusal)
    tensors, size = _tensors(model, config, chosen)
    config_file = folder.config_json(chosen, m, heads.vocab_rows(m, tokenizer.vocab_size), tokenizer, dtype)
    if head:
        finetune = config.finetune
        config_file |= task_heads.to_config(chosen, head.about(), finetune.pooling, finetune.dropout_rate)
    if dtype == "bfloat16":
        tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    result = _result(path, model.meta["step"]) if model.meta and not head else None
    meta = {**model.meta, "fine_tuned": {**model.meta.get("fine_tuned", {}), **head.about()}} if head else model.meta
    card = model_card.ModelCard(output.name, chosen, config, size, tokenizer, meta, result, licence, language)
    contents = {**_files(model, config_file), "README.md": card.text().encode()}
    _write(output, contents, tensors, lambda path: complete(path, model))
    return model


def _tensors(model: LoadedModel, config: Config, chosen: Architecture) -> tuple[dict[str, Any], int]:
    """Returns the tensors of a class in transformers, with those of a task's head, and the number of parameters."""
    m, net, head = config.model, model.forward.model, model.task_head
    params = jax.device_get(model.params)
    if config.objective.name == "rtd":  # the generator is left out
        net = electra.discriminator(m, model.tokenizer.vocab_size)
        del params["generator"]
    if head:  # in the place of the head of pretraining
        params = {"encoder": params["encoder"]}
    mappings = list(weights.param_mappings(chosen, params, net.dims, m.num_layers))
    tensors = weights.params_to_tensors(mappings, params, model.tokenizer.pad_id + 1)
    if head:
        params["task"] = jax.device_get(head.params)
        tensors |= task_heads.to_tensors(chosen, head.task, params["task"])
    return tensors, sum(x.size for x in jax.tree.leaves(params))


def _rounded_model(model: LoadedModel, dtype: str) -> LoadedModel:
    head = model.task_head
    task_head = head and head._replace(params=_rounded(head.params, dtype))
    return model._replace(params=_rounded(model.params, dtype), task_head=task_head)


def _rounded(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)


def _files(model: LoadedModel, config_file: dict[str, Any]) -> dict[str, bytes]:
    """Returns the contents of all files but the card and the weights."""
    tokenizer, config, m = model.tokenizer, model.config, model.config.model
    cut = min(config.finetune.max_length, model.max_length)
    length = cut if model.task_head else model.max_length
    contents = {
        "config.json": config_file,
        "tokenizer_config.json": tokenizer_json.settings(tokenizer, length, m.type_vocab_size),
        "special_tokens_map.json": tokenizer_json.special_tokens(tokenizer),
    }
    came_as_one = not model.meta and sentence_transformers.is_sentence_encoder(
        folder.open_folder(config.init_from).path
    )
    if ("fine_tuned" in model.meta or came_as_one) and not model.task_head:
        contents |= sentence_transformers.files(config.finetune, cut, m.hidden_size)
    texts = {name: f"{json.dumps(x, indent=2, ensure_ascii=False)}\n".encode() for name, x in contents.items()}
    return {**texts, "tokenizer.json": tokenizer_json.content(tokenizer, min(1, max(0, m.type_vocab_size - 1)))}


def _write(output: Path, files: dict[str, bytes], tensors: dict[str, Any], complete: Callable[[Path], Any]) -> None:
    """Writes a folder under another name, and renames it once it is complete."""
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)  # a new one: whatever has that name is not ours
    except OSError as e:
        raise UserError(f"--output: '{temporary}' cannot be made: {e.strerror or e}") from e
    try:
        for name, content in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content)
        folder.write_tensors(temporary / folder.WEIGHTS, tensors)
        complete(temporary)
        if output.exists():
            output.rmdir()
        os.replace(temporary, output)
    except OSError as e:
        raise UserError(f"--output: '{output}' cannot be written: {e.strerror or e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _result(path: str, step: int) -> dict[str, float] | None:
    """Returns the run's result.json if it is that of the step, the run's last one."""
    for checkpoint in find_checkpoints(path):
        file = checkpoint.parent.parent / "result.json"
        with gcs.errors(checkpoint):
            # A run that continues deletes the file, so it belongs to the last step.
            if saved_steps(file.parent)[-1:] == [step]:
                return files.read_result(file)
    return None
