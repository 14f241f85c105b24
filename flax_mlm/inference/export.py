"""Export: a checkpoint as a Hugging Face folder that transformers loads."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes

from flax_mlm.checkpoint.format import find_checkpoints
from flax_mlm.checkpoint.store import saved_steps
from flax_mlm.config.schema import Config
from flax_mlm.errors import UserError
from flax_mlm.hf import sentence_transformers, tokenizer_json
from flax_mlm.hf.folder import WEIGHTS, config_json, matching_architecture, write_tensors
from flax_mlm.hf.model_card import ModelCard
from flax_mlm.hf.weights import param_mappings, params_to_tensors
from flax_mlm.inference.load import load_model
from flax_mlm.inference.model import LoadedModel
from flax_mlm.model import electra, heads
from flax_mlm.storage import gcs


def export(
    path: str,
    output: Path,
    config: Config,
    architecture: str = "",
    dtype: str = "float32",
    licence: str = "",
    language: str = "",
) -> LoadedModel:
    """Writes a Hugging Face folder, complete or not at all.

    Args:
      path: as for `load_model`, and `config`.
      output: the folder to create.
      architecture: bert, roberta, albert, modernbert or electra; empty: the first one that fits.
      dtype: of the weights, float32 or bfloat16.
      licence, language: of the model, for its card, as Hugging Face spells them; empty: not stated.

    Returns:
      The model that was written, its weights rounded to `dtype`, and computed in float32.

    Raises:
      UserError: transformers has no class for this encoder; or the folder exists or cannot be written.
    """
    output = output.expanduser().absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output: '{output}' exists; name another folder, or delete that one")
    model = load_model(path, dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32")))
    if dtype == "bfloat16":
        model = model._replace(params=jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), model.params))

    m, tokenizer, net = config.model, model.tokenizer, model.forward.model
    chosen = matching_architecture(m, config.objective.name, architecture, tokenizer.tokens[tokenizer.cls_id])
    params = jax.device_get(model.params)
    if config.objective.name == "rtd":  # the generator is left out
        net = electra.discriminator(m, tokenizer.vocab_size)
        del params["generator"]
    tensors = params_to_tensors(
        list(param_mappings(chosen, params, net.dims, m.num_layers)), params, tokenizer.pad_id + 1
    )
    if dtype == "bfloat16":
        tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    card = ModelCard(
        name=output.name,
        architecture=chosen,
        config=config,
        num_params=sum(x.size for x in jax.tree.leaves(params)),
        tokenizer=tokenizer,
        meta=model.meta,
        result=_result(path, model.meta["step"]) if model.meta else None,
        licence=licence,
        language=language,
    )
    config_file = config_json(chosen, m, heads.vocab_rows(m, tokenizer.vocab_size), tokenizer, dtype)
    _write(output, {**_files(model, config, config_file), "README.md": card.text().encode()}, tensors)
    return model


def _files(model: LoadedModel, config: Config, config_file: dict[str, Any]) -> dict[str, bytes]:
    """Returns the contents of all files but the card and the weights."""
    tokenizer, m = model.tokenizer, config.model
    contents: dict[str, Any] = {
        "config.json": config_file,
        "tokenizer_config.json": tokenizer_json.settings(tokenizer, m.max_positions),
        "special_tokens_map.json": tokenizer_json.special_tokens(tokenizer),
        **(sentence_transformers.files(config) if "fine_tuned" in model.meta else {}),
    }
    files = {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in contents.items()}
    pair_type = min(1, max(0, m.type_vocab_size - 1))
    return {
        **{name: text.encode() for name, text in files.items()},
        "tokenizer.json": tokenizer_json.content(tokenizer, pair_type),
    }


def _write(output: Path, files: dict[str, bytes], tensors: dict[str, Any]) -> None:
    """Writes a folder under another name, and renames it once it is complete."""
    temporary = output.with_name(output.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content)
        write_tensors(temporary / WEIGHTS, tensors)
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
            if saved_steps(file.parent)[-1:] == [step] and file.exists():
                return json.loads(file.read_text())
    return None
