"""What makes a Hugging Face folder one of sentence-transformers too: how states become a vector."""

from typing import Any

from flax_mlm.config import Config

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
        "1_Pooling/config.json": {"word_embedding_dimension": config.model.hidden_size, **mode},
        "2_Normalize/config.json": {},
    }
