"""The files that make a Hugging Face folder one of sentence-transformers: how texts become vectors."""

from pathlib import Path
from typing import Any

from flax_mlm.config.schema import FinetuneConfig
from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.errors import UserError, as_user_error
from flax_mlm.hf.folder import read_json

_MODULES = "modules.json"
_TRANSFORMER = "sentence_*_config.json"  # older versions name the architecture
_PROMPTS = "config_sentence_transformers.json"
_TYPE = "sentence_transformers."  # beginning of a module's type
_SUPPORTED = ("Transformer", "Pooling", "Normalize", "Dropout")  # what we compute; dropout is for training
_MODES = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}  # up to version 4: pooling_mode_NAME
_NEWER_MODES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_OTHER_SETTINGS = ("processing_kwargs", "query_length", "document_length", "query_expansion")  # of Transformer


def files(finetune: FinetuneConfig, max_length: int, hidden_size: int) -> dict[str, Any]:
    """Returns name -> JSON for vectors of length 1 by `finetune.pooling`, of texts cut to `max_length` tokens.

    The modules are sentence-transformers' own: Transformer, Pooling, Normalize.
    """
    chain = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{_TYPE}models.{kind}"}
        for i, (path, kind) in enumerate(chain)
    ]
    mode = {f"pooling_mode_{name}": pooling == finetune.pooling for pooling, name in _MODES.items()}
    prompt = {"prompts": {"default": finetune.prompt}, "default_prompt_name": "default"}
    return {
        _MODULES: modules,
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": hidden_size, **mode},
        "2_Normalize/config.json": {},
        **({_PROMPTS: prompt} if finetune.prompt else {}),
    }


def is_sentence_encoder(folder: Path) -> bool:
    """Returns whether a folder says how its vectors are made."""
    return (folder / _MODULES).exists()


def read(folder: Path, tokenizer: Tokenizer, max_positions: int, max_length: int) -> tuple[dict[str, Any], list[str]]:
    """Reads how the vectors of a folder are made.

    Args:
      max_length: tokens that a text may have where the folder is no sentence encoder; its tokenizer may allow fewer.

    Returns:
      fields of `FinetuneConfig` with their values, and what else changes vectors, by name: we do not compute it.

    Raises:
      UserError: a file is damaged, or names a prompt that it does not have.
    """
    tokenizing = _read(folder / "tokenizer_config.json")
    length = tokenizing.get("model_max_length")
    problem = f"init_from: {folder / _MODULES} is no list of modules with type and path: "
    with as_user_error(problem, KeyError, TypeError):
        modules = {_kind(str(m["type"])): folder / m["path"] for m in _read(folder / _MODULES, list)}
    if not modules:
        return {"max_length": min(max_length, length)} if type(length) is int and length > 3 else {}, []
    unsupported = [kind for kind in modules if kind not in _SUPPORTED]

    named = sorted(modules.get("Transformer", folder).glob(_TRANSFORMER))
    encoder = _read(named[0]) if named else {}
    length = encoder.get("max_seq_length") or length or max_positions
    if type(length) not in (int, float) or length < 1:
        raise UserError(f"init_from: '{folder}' has max_seq_length = {length!r}; expected a number of tokens")
    cased, lower = tokenizer.encode(["THE FIVE BOXING WIZARDS JUMP", "the five boxing wizards jump"])
    unsupported += ["do_lower_case"] if encoder.get("do_lower_case") and cased.tolist() != lower.tolist() else []
    unsupported += [name for name in _OTHER_SETTINGS if encoder.get(name)]
    unsupported += ["truncation_side = left"] if tokenizing.get("truncation_side") == "left" else []

    settings = _read(folder / _PROMPTS)
    prompts, name = settings.get("prompts") or {}, settings.get("default_prompt_name")
    prompt = prompts.get(name, None if name else "") if isinstance(prompts, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f"init_from: {folder / _PROMPTS} has no text for default_prompt_name = {name!r} in prompts")
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity != "cosine" and not (similarity == "dot" and "Normalize" in modules):
        unsupported.append(f"similarity_fn_name = {similarity}")  # of vectors that are not of length 1

    pooling = _read(modules["Pooling"] / "config.json") if "Pooling" in modules else {"pooling_mode": "none"}
    mode = _pooling_mode(pooling)
    unsupported += [] if mode else ["Pooling"]
    unsupported += ["include_prompt = false"] if prompt and pooling.get("include_prompt") is False else []
    fields = {"max_length": min(int(length), max_positions), "prompt": prompt}
    return {**fields, "pooling": mode} if mode else fields, unsupported


def _read(file: Path, kind: type = dict) -> Any:
    return read_json(file, kind) if file.exists() else kind()


def _kind(module_type: str) -> str:
    """Returns the last name of a module's type; all of it where it is code of the folder's own."""
    return module_type.rpartition(".")[2] if module_type.startswith(_TYPE) else module_type


def _pooling_mode(stored: dict[str, Any]) -> str | None:
    """Returns the value of `finetune.pooling`, None where there is none that is like it."""
    if "pooling_mode" in stored:
        found = stored["pooling_mode"]
        return _NEWER_MODES.get(str(found[0] if isinstance(found, list) and len(found) == 1 else found))
    names = [key for key, value in stored.items() if key.startswith("pooling_mode_") and value is True]
    modes = {f"pooling_mode_{name}": mode for mode, name in _MODES.items()}
    return modes.get(names[0]) if len(names) == 1 else None if names else "mean"
