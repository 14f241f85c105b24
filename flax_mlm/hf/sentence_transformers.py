"""The files that make a Hugging Face folder one of sentence-transformers: how hidden states become a vector."""

import json
from pathlib import Path
from typing import Any

from flax_mlm.config.schema import Config

_FILE = "1_Pooling/config.json"
_TYPE = "sentence_transformers.models."  # beginning of a module's type
_MODES = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}  # up to version 4: pooling_mode_NAME
_NEWER_MODES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}


def files(config: Config) -> dict[str, Any]:
    """Returns name -> JSON for vectors by `finetune.pooling`, of length 1.

    The modules are sentence-transformers' own: Transformer, Pooling, Normalize.
    """
    chain = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [{"idx": i, "name": str(i), "path": path, "type": _TYPE + kind} for i, (path, kind) in enumerate(chain)]
    mode = {f"pooling_mode_{name}": pooling == config.finetune.pooling for pooling, name in _MODES.items()}
    length = min(config.finetune.max_length, config.model.max_positions)
    return {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False},
        _FILE: {"word_embedding_dimension": config.model.hidden_size, **mode},
        "2_Normalize/config.json": {},
    }


def read_pooling(folder: Path) -> tuple[str | None, list[str]]:
    """Reads how the vectors of a folder are made; a folder without these files has no pooling.

    Returns:
      the value of `finetune.pooling`, None where there is none that is like it; and further modules, which we do not
      compute.
    """
    try:
        stored = json.loads((folder / _FILE).read_text(encoding="utf8"))
        enabled = [key for key, value in stored.items() if key.startswith("pooling_mode_") and value is True]
        chain = folder / "modules.json"
        modules = json.loads(chain.read_text(encoding="utf8")) if chain.exists() else []
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None, []
    if "pooling_mode" in stored:
        mode = _NEWER_MODES.get(str(stored["pooling_mode"]))
    else:
        mode = next((mode for mode, name in _MODES.items() if enabled == [f"pooling_mode_{name}"]), None)
    unsupported = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    return mode, unsupported + ([] if mode else ["Pooling"])
