"""Hugging Face folders: find the architecture, read and write config.json and weights.

Only config.json and safetensors files are read. Nothing in a folder can run code here.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.config.schema import ModelConfig
from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.errors import UserError, as_user_error, hub_remedy, refuse_lfs_pointer
from flax_mlm.hf import architecture as arch
from flax_mlm.hf import bert, modernbert
from flax_mlm.hf.architecture import Architecture, SpecialIds
from flax_mlm.hf.distilbert import DISTILBERT
from flax_mlm.storage import hub
from flax_mlm.storage.retry import retrying

ARCHITECTURES = (
    *(bert.BERT, bert.BERT_CAUSAL, bert.ROBERTA, bert.ROBERTA_CAUSAL, bert.ALBERT, DISTILBERT, bert.XLM_ROBERTA),
    *(bert.CAMEMBERT, modernbert.MODERNBERT, modernbert.DECODER, bert.ELECTRA_GENERATOR, bert.ELECTRA),
)
WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_WEIGHTS = (*_PICKLES, ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors")  # endings of names
_JSON_LIMIT = 1 << 26  # bytes
_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # names of 2018


class Folder(NamedTuple):
    """A Hugging Face folder: its path, its architecture, its config.json, and the fields of `ModelConfig` from that."""

    path: Path
    architecture: Architecture
    config: dict[str, Any]
    model_fields: dict[str, Any]

    def tensors(self) -> dict[str, np.ndarray]:
        """Reads all weights, under the names of today's transformers.

        Raises:
          UserError: there are none, or they are damaged.
        """
        tensors: dict[str, np.ndarray] = {}
        for file in self.weight_files():
            tensors |= _read_tensors(self.path / file)
        prefix = self.architecture.prefix
        if any(name.startswith(prefix) for name in tensors):
            prefix = ""  # only a model without head lacks it
        for old, new in _RENAMED.items():
            tensors = {name.removesuffix(old) + new if name.endswith(old) else name: x for name, x in tensors.items()}
        return {prefix + name: tensor for name, tensor in tensors.items()}

    @retrying
    def fingerprint(self) -> str:
        """Hashes the files of weights, so that a folder is known under another path."""
        digest = hashlib.sha256()
        for file in self.weight_files():
            with (self.path / file).open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Checks that a tokenizer belongs to the model.

        Raises:
          UserError: it has more tokens than the embedding has rows, or far fewer; or config.json names other ids.
        """
        rows, count, own = self.config["vocab_size"], tokenizer.vocab_size, "set tokenizer.path to the model's own one"
        beginning = (
            f"init_from: '{self.path}' has an embedding of {rows:,} rows, but the tokenizer has {count:,} tokens"
        )
        if count > rows:
            others = ", ".join(map(repr, tokenizer.tokens[rows : rows + 3]))
            hint = "name new words in tokenizer.extra_tokens_file"
            raise UserError(f"{beginning}: {others} and all that follow have no row; {own}, or {hint}")
        if rows - count >= max(128, rows & -rows, 0.1 * count):  # neither rounded up nor tokens kept for later use
            raise UserError(f"{beginning}; {own}")
        named = self.config
        if self.architecture.has_offset and named.get("pad_token_id") is None:
            named = {**named, "pad_token_id": arch.position_offset(named) - 1}
        marks = {tokenizer.cls_id, tokenizer.sep_id}  # mmBERT names the one for the other
        for role, ids in {"pad": {tokenizer.pad_id}, "mask": {tokenizer.mask_id}, "cls": marks, "sep": marks}.items():
            found, right = named.get(f"{role}_token_id"), getattr(tokenizer, f"{role}_id")
            unset = type(found) is int and found >= rows  # what transformers writes where nobody set it
            unset |= role == "pad" and found == 0 and not self.architecture.has_offset
            if found is not None and found not in ids and not unset:
                problem = f"{role}_token_id = {found!r}; the tokenizer has {tokenizer.tokens[right]} as {right}"
                raise UserError(f"init_from: {self.path / 'config.json'} has {problem}; {own}, or correct the number")

    def weight_files(self) -> list[str]:
        """Returns the names of the files of weights. Raises UserError where there are none that can be read safely."""
        if (self.path / WEIGHTS).exists():
            return [WEIGHTS]
        if (self.path / _INDEX).exists():
            files = read_json(self.path / _INDEX).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
                raise UserError(f"init_from: {self.path / _INDEX} has no weight_map of plain file names")
            return sorted(set(files.values()))
        content, remedy = "no weights", "save_pretrained of transformers writes it"
        if others := _other_weights(self.path):
            content = f"only {others[0].name}"
        if others and others[0].suffix in _PICKLES:
            content += ", a pickle, which can run code"
            name = self.architecture.class_name
            code = f"from transformers import {name} as M; M.from_pretrained('{self.path}').save_pretrained('DIR')"
            remedy = f'convert it where it can do no harm: python -c "{code}"'
        raise UserError(f"init_from: '{self.path}' holds {content}; it needs {WEIGHTS}: {remedy}")


def _other_weights(folder: Path) -> list[Path]:
    return [file for ending in _OTHER_WEIGHTS for file in sorted(folder.glob(f"*{ending}"))]


@retrying
def is_hf_folder(path: str) -> bool:
    """Returns whether a path is a Hugging Face folder, with weights of any kind beside config.json, and no run; or the
    name of a model of the hub (`hf:ORG/NAME`), of which nothing is known yet.
    """
    if hub.parse("--checkpoint", path):
        return True
    folder = Path(path).expanduser()
    return (folder / "config.json").is_file() and bool((folder / _INDEX).exists() or _other_weights(folder))


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Reads the config.json of a folder, or of a model of the hub (`hf:ORG/NAME`).

    Raises:
      UserError: it is no Hugging Face folder, its weights cannot be read, or our encoder cannot compute its model.
    """
    path = hub.local("init_from", path)
    folder = Path(path).expanduser()
    run = Path(re.sub(r"(@\d+|/checkpoints(/\d+)?)/*$", "", path)).expanduser()
    if not is_hf_folder(path) and (run / "checkpoints").is_dir():
        checkpoint = re.sub("/checkpoints/*$", "", path)
        remedy = f"export it: python -m flax_mlm.export --checkpoint={checkpoint} --output=DIR, and give DIR"
        raise UserError(f"init_from: '{path}' is of a run; expected a Hugging Face folder; {remedy}")
    if not folder.is_dir():
        remedy = hub_remedy(path) or "give a Hugging Face folder with config.json in it"
        raise UserError(f"init_from: '{path}' is not a folder; {remedy}")
    config = read_json(folder / "config.json")
    architecture = _architecture(folder, config)
    with as_user_error(f"init_from: {folder / 'config.json'} has ", ValueError):
        _check_vocab(config)
        fields = architecture.from_hf_config(config)
    result = Folder(folder, architecture, config, fields)
    result.weight_files()
    return result


def _architecture(folder: Path, config: Mapping[str, Any]) -> Architecture:
    model_type = config.get("model_type")
    if model_type is None and "position_embedding_type" not in config and "type_vocab_size" in config:
        classes = str(config.get("architectures") or "Bert").strip("[]'")  # before 2020 the type was not written
        model_type = next((a.model_type for a in ARCHITECTURES if classes.lower().startswith(a.model_type)), None)
    candidates = [a for a in ARCHITECTURES if a.model_type == model_type]
    if not candidates:
        known = ", ".join(sorted({a.model_type for a in ARCHITECTURES}))
        raise UserError(f"init_from: '{folder}' holds a model of type {model_type}; expected one of {known}")
    if config.get("is_decoder") is True:
        candidates.sort(key=lambda a: a.objective != "clm")
    return candidates[0]


def _check_vocab(config: Mapping[str, Any]) -> None:
    arch.expect(config, quantization_config=None)
    size, pad_id = config.get("vocab_size"), config.get("pad_token_id")
    if type(size) is not int or not 0 < size < 2**24:
        raise ValueError(f"vocab_size = {size!r}; expected a positive number")
    if pad_id is not None and not (type(pad_id) is int and 0 <= pad_id < size):
        raise ValueError(f"pad_token_id = {pad_id!r}; expected a token id below vocab_size")


@retrying
def read_json(file: Path, kind: type = dict) -> Any:
    """Reads a JSON file that holds an object, or another kind of value. Raises UserError."""
    try:
        if not 0 < (size := file.stat().st_size) <= _JSON_LIMIT:
            raise ValueError(f"it has {size} bytes")
        content = json.loads(file.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError) as e:
        message = e.strerror if isinstance(e, OSError) else " ".join(str(e).split())
        raise UserError(f"init_from: {file} cannot be read as JSON ({message})") from e
    if not isinstance(content, kind):
        raise UserError(f"init_from: {file} holds no JSON {'object' if kind is dict else kind.__name__}")
    return content


@retrying
def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        refuse_lfs_pointer(file)
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        raise UserError(f"init_from: {file} is damaged or not safetensors ({' '.join(str(e).split())})") from e


def matching_architecture(
    model: ModelConfig,
    objective: str,
    name: str,
    cls_token: str,
    refusal: Callable[[Architecture], str] = lambda architecture: "",
) -> Architecture:
    """Returns the architecture that an encoder of ours can be exported as.

    An encoder fits where reading the config.json written for it gives its own fields again.

    Args:
      name: value of --architecture; empty: the first that fits, RoBERTa first where [CLS] is spelled `<s>`.
      cls_token: how the tokenizer spells [CLS].
      refusal: architecture -> what else it needs; empty: nothing.

    Raises:
      UserError: none fits; the message names the fields.
    """
    candidates = [a for a in ARCHITECTURES if a.objective == objective and a.model_type.startswith(name)]
    if not candidates:
        raise UserError(f"--architecture={name} has no class in transformers for objective {objective}")
    if cls_token == "<s>":
        candidates.sort(key=lambda a: a.model_type != "roberta")
    misfits = []
    for architecture in candidates:
        try:
            fields = architecture.from_hf_config(architecture.to_hf_config(model, SpecialIds(0, 1, 2)))
            wrong = [f"model.{field} = {x}" for field, x in fields.items() if getattr(model, field) != x]
        except ValueError as e:
            wrong = [str(e)]
        wrong = wrong or list(filter(None, [refusal(architecture)]))
        if not wrong:
            return architecture
        misfits.append(f"{architecture.model_type} needs {', '.join(wrong)}")
    raise UserError(f"this encoder fits no class of transformers for objective {objective}: {'; '.join(misfits)}")


def config_json(
    architecture: Architecture, model: ModelConfig, vocab_rows: int, tokenizer: Any, dtype: str = "float32"
) -> dict[str, Any]:
    """Returns the config.json of an encoder of ours.

    Args:
      vocab_rows: rows of the token embedding.
      tokenizer: a `Tokenizer`, or anything else with `pad_id`, `cls_id` and `sep_id`.
      dtype: of the weights.
    """
    keys = architecture.to_hf_config(model, tokenizer)
    if "is_decoder" in keys:
        keys["is_decoder"] = architecture.objective == "clm"
    head = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    return {**head, **keys, "vocab_size": vocab_rows, "dtype": dtype}


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file."""
    from safetensors.numpy import save

    file.write_bytes(save(dict(tensors), metadata={"format": "pt"}))  # `save_file` makes files for the owner alone
