"""What makes a Hugging Face folder one of sentence-transformers too: how states become a vector."""

import json
import sys
from pathlib import Path
from typing import Any

from flax_mlm.config.schema import Config

_FILE = "1_Pooling/config.json"
_MODES = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}


def files(config: Config) -> dict[str, Any]:
    """Name -> JSON, for a model in `finetune.pooling` and vectors of length 1.

    Each file is one of sentence-transformers' own: a chain of modules, Transformer, Pooling, Normalize.
    """
    chain = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(chain)
    ]
    mode = {f"pooling_mode_{name}": pooling == config.finetune.pooling for pooling, name in _MODES.items()}
    length = min(config.finetune.max_length, config.model.max_positions)
    return {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False},
        _FILE: {"word_embedding_dimension": config.model.hidden_size, **mode},
        "2_Normalize/config.json": {},
    }


def pooling(folder: Path) -> str | None:
    """`finetune.pooling` of the model in a folder; None where it does not say, or says what is none of ours. What else
    it does to its vectors, and we do not, is said."""
    try:
        stored = json.loads((folder / _FILE).read_text(encoding="utf8"))
        named = [key for key, on in stored.items() if key.startswith("pooling_mode_") and on is True]
        chain = folder / "modules.json"
        modules = json.loads(chain.read_text(encoding="utf8")) if chain.exists() else []
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    if "pooling_mode" in stored:  # newer files
        found = {"cls": "cls", "mean": "mean", "lasttoken": "last"}.get(str(stored["pooling_mode"]))
    else:
        found = next((mode for mode, name in _MODES.items() if named == [f"pooling_mode_{name}"]), None)
    left_out = [f"its {kind}" for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    left_out += [] if found else ["its kind of pooling"]
    if left_out:
        print(f"note: vectors will not be those of '{folder}': {' and '.join(left_out)} cannot be had", file=sys.stderr)
    return found
