"""Hugging Face folders: which architecture one holds, its weights by name, and writing one.

Only `config.json` and safetensors files are read. Nothing in a folder can run code here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from flax_mlm.config.schema import ModelConfig
from flax_mlm.errors import UserError
from flax_mlm.hf import bert, modernbert, sentence_transformers
from flax_mlm.hf.architecture import Architecture

ARCHITECTURES = (
    *(bert.BERT, bert.BERT_CAUSAL, bert.ROBERTA, bert.ROBERTA_CAUSAL, bert.ALBERT),
    *(modernbert.MODERNBERT, modernbert.DECODER, bert.ELECTRA_GENERATOR, bert.ELECTRA),
)
WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_JSON_LIMIT = 1 << 26  # bytes


class Folder(NamedTuple):
    """A Hugging Face folder that can be read: its path, its architecture, and its config.json."""

    path: Path
    architecture: Architecture
    config: dict[str, Any]

    @property
    def model_fields(self) -> dict[str, Any]:
        """The fields of `ModelConfig` that its config.json decides."""
        kinds = ModelConfig.__annotations__
        fields = {name: kinds[name](self.config[keys.split("|")[0]]) for name, keys in self.architecture.fields.items()}
        for name, keys in self.architecture.fields.items():
            if keys in self.architecture.more:
                fields[name] -= self.architecture.more[keys]
        fields |= self.architecture.ours
        if self.architecture.model_type == "roberta":
            fields["max_positions"] -= self.offset
        if self.architecture.model_type == "electra" and fields["embedding_size"] == fields["hidden_size"]:
            fields["embedding_size"] = 0
        return fields

    @property
    def offset(self) -> int:
        """Rows of a RoBERTa's position embedding that are not used."""
        pad_id = self.config.get("pad_token_id")
        return (1 if pad_id is None else pad_id) + 1

    def tensors(self) -> dict[str, np.ndarray]:
        """All weights by name, under the names of today's transformers.

        Raises:
          UserError: there are none, or they are damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        if (self.path / WEIGHTS).exists():
            files = [WEIGHTS]
        elif (self.path / _INDEX).exists():
            named = _read_json(self.path / _INDEX).get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(f, str) and Path(f).name == f for f in named.values()):
                raise UserError(f"init_from: {self.path / _INDEX} has no weight_map of plain file names")
            files = sorted(set(named.values()))
        else:
            pickles = sorted(p.name for p in self.path.glob("*.bin")) or sorted(p.name for p in self.path.glob("*.pt"))
            why = f"only {pickles[0]}, a pickle, which can run code" if pickles else "no weights"
            raise UserError(f"init_from: '{self.path}' holds {why}; it needs {WEIGHTS} (save_pretrained writes it)")
        found: dict[str, np.ndarray] = {}
        for file in files:
            try:
                found |= load_file(self.path / file)
            except (SafetensorError, OSError, ValueError, KeyError) as e:
                said = " ".join(str(e).split())
                raise UserError(f"init_from: {self.path / file} is damaged or not safetensors ({said})") from e
        base = self.architecture.base
        prefix = "" if any(name.startswith(base) for name in found) else base  # of a model without head
        renamed = {".gamma": ".weight", ".beta": ".bias"}  # names of 2018
        result = {}
        for name, tensor in found.items():
            for old, new in renamed.items():
                name = name.removesuffix(old) + new if name.endswith("LayerNorm" + old) else name
            result[prefix + name] = tensor
        return result


def is_one(path: str) -> bool:
    """Whether a folder is Hugging Face's and not ours: weights lie beside its config.json."""
    folder = Path(path).expanduser()
    return (folder / "config.json").is_file() and any((folder / name).exists() for name in (WEIGHTS, _INDEX))


def open_folder(path: str) -> Folder:
    """Reads the config.json of a folder.

    Raises:
      UserError: it is no Hugging Face folder, or holds a model that is none of ours.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"init_from: '{path}' is not a folder; give a Hugging Face folder with config.json in it")
    config = _read_json(folder / "config.json")
    known = {a.model_type: a for a in reversed(ARCHITECTURES)}
    kind = config.get("model_type")
    if kind is None and "position_embedding_type" not in config and "type_vocab_size" in config:
        classes = " ".join(map(str, config.get("architectures") or ["Bert"]))  # before 2020 it was not written
        kind = next((a.model_type for a in ARCHITECTURES if classes.lower().startswith(a.model_type)), None)
    if not isinstance(kind, str) or kind not in known:
        raise UserError(f"init_from: '{folder}' holds a model of type {kind}; it can be {', '.join(sorted(known))}")
    architecture = known[kind]
    if config.get("is_decoder") is True:
        architecture = next((a for a in ARCHITECTURES if a.model_type == kind and a.objective == "clm"), architecture)
    config = architecture.normalise({**architecture.defaults, **config})

    def refuse(key: str, can: str) -> None:
        raise UserError(f"init_from: {folder / 'config.json'} has {key} = {config.get(key)!r}; it can be {can}")

    for key, values in architecture.theirs.items():
        if config.get(key, values[0]) not in values:
            refuse(key, " or ".join(map(repr, values)))
    for name, keys in architecture.fields.items():
        wanted = ModelConfig.__annotations__[name]
        for key in keys.split("|"):
            value = config.get(key)
            if wanted is bool:
                ok = isinstance(value, bool)
            else:
                ok = isinstance(value, (int, float) if wanted is float else int) and value > 0
            if not ok:
                refuse(key, "true or false" if wanted is bool else "a positive number")
            if value != config[keys.split("|")[0]]:
                refuse(key, f"only what {keys.split('|')[0]} is, {config[keys.split('|')[0]]!r}")
    if type(config.get("vocab_size")) is not int or not 0 < config["vocab_size"] < 2**24:
        refuse("vocab_size", "a positive number")
    pad_id = config.get("pad_token_id")
    if pad_id is not None and not (type(pad_id) is int and 0 <= pad_id < config["vocab_size"]):
        refuse("pad_token_id", "the number of a piece")
    return Folder(folder, architecture, config)


def adopt(config: ConfigDict, given: set[str], as_it_is: bool = False) -> None:
    """Sets what the folder `config.init_from` decides: the shape of the model, and the tokenizer and the pooling of
    vectors if none is set.

    Args:
      given: names of the fields that the user has set.
      as_it_is: it is not trained further, so that its objective is that of its architecture.

    Raises:
      UserError: the folder cannot be used, or the user has set a field to something else.
    """
    folder = open_folder(config.init_from)
    for name, value in folder.model_fields.items():
        if f"model.{name}" in given and config.model[name] != value:
            raise UserError(f"model.{name} is {config.model[name]}, but {value} in '{folder.path}', to start from")
        config.model[name] = value
    if as_it_is and "objective.name" not in given:
        config.objective.name = folder.architecture.objective
    if not config.tokenizer.path:
        config.tokenizer.path = config.init_from
    if "finetune.pooling" not in given and (mode := sentence_transformers.pooling(folder.path)):
        config.finetune.pooling = mode
    rows = folder.config["vocab_size"]
    if config.tokenizer.extra_tokens_file:
        from flax_mlm.data.tokenizer.load import load_tokenizer

        rows = max(rows, load_tokenizer(config.tokenizer.path, config.tokenizer.extra_tokens_file).vocab_size)
    # The embedding keeps all its rows, also those that no piece of the tokenizer has.
    config.model.vocab_multiple_of *= -(-rows // config.model.vocab_multiple_of)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if not 0 < (size := file.stat().st_size) <= _JSON_LIMIT:
            raise ValueError(f"it has {size} bytes")
        content = json.loads(file.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError) as e:
        said = e.strerror if isinstance(e, OSError) else " ".join(str(e).split())
        raise UserError(f"init_from: {file} cannot be read as JSON ({said})") from e
    if not isinstance(content, dict):
        raise UserError(f"init_from: {file} holds no JSON object")
    return content


def matching(model: ModelConfig, objective: str, name: str, cls_piece: str) -> Architecture:
    """The architecture that an encoder of ours can be written as.

    Args:
      name: of the one wanted; empty: the first that fits, and RoBERTa only where [CLS] is spelled as there.
      cls_piece: how the tokenizer spells [CLS].

    Raises:
      UserError: none fits; the message names the fields.
    """
    candidates = [a for a in ARCHITECTURES if a.objective == objective and (not name or a.name.startswith(name))]
    if not candidates:
        raise UserError(f"--architecture={name} has no class in transformers for objective {objective}")
    if cls_piece == "<s>":
        candidates.sort(key=lambda a: a.model_type != "roberta")
    why = []
    for architecture in candidates:
        wrong = [f"model.{f} = {v}" for f, v in architecture.ours.items() if getattr(model, f) != v]
        zero = [f"model.{f} > 0" for f in architecture.fields if f.endswith("_size") and not getattr(model, f)]
        if architecture.model_type == "electra":
            zero = [text for text in zero if "embedding_size" not in text]
        if not wrong + zero:
            return architecture
        why.append(f"{architecture.name} needs {', '.join(wrong + zero)}")
    raise UserError(f"this encoder fits no class of transformers for objective {objective}: {'; '.join(why)}")


def config_json(architecture: Architecture, model: ModelConfig, vocab_rows: int, tokenizer: Any) -> dict[str, Any]:
    """The config.json of an encoder of ours."""
    config: dict[str, Any] = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    for name, keys in (*architecture.fields.items(), *architecture.training.items()):
        config |= dict.fromkeys(keys.split("|"), getattr(model, name))
    for key, more in architecture.more.items():
        config[key] += more
    config |= {key: values[0] for key, values in architecture.theirs.items()}
    config |= {"vocab_size": vocab_rows, "pad_token_id": tokenizer.pad_id, "dtype": "float32"}
    config |= {"bos_token_id": tokenizer.cls_id, "eos_token_id": tokenizer.sep_id}
    if architecture.model_type.startswith("modernbert"):
        config |= {"cls_token_id": tokenizer.cls_id, "sep_token_id": tokenizer.sep_id}
    if architecture.model_type == "electra":
        config["embedding_size"] = model.embedding_size or model.hidden_size
    if architecture.model_type == "roberta":
        config["max_position_embeddings"] += tokenizer.pad_id + 1
    return config


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file."""
    from safetensors.numpy import save

    file.write_bytes(save(dict(tensors), metadata={"format": "pt"}))  # `save_file` makes files for the owner alone
