"""DistilBERT (arXiv:1910.01108), as transformers has it: a BERT without token types, under other names."""

import dataclasses
from typing import Any

from flax_mlm.config.schema import ModelConfig
from flax_mlm.hf import architecture as arch
from flax_mlm.hf.architecture import HfConfig, SpecialIds, expect, linear, weight
from flax_mlm.hf.bert import BERT

_SIZES = {
    "num_layers": "n_layers",
    "hidden_size": "dim",
    "num_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "max_positions": "max_position_embeddings",
}
_LAYER = "distilbert.transformer.layer.{}"


def _from_distilbert(config: HfConfig) -> dict[str, Any]:
    expect(config, tie_word_embeddings=True)
    fields = arch.sizes_from_hf(config, _SIZES) | {"activation": arch.activation_from_hf(config, "activation")}
    fields |= dict(position_embedding="learned", norm_position="post", norm_eps=1e-12, use_bias=True, glu=False)
    return fields | dict(type_vocab_size=0, embedding_size=0, share_layers=False, global_attn_every_n_layers=1)


def _to_distilbert(model: ModelConfig, ids: SpecialIds) -> dict[str, Any]:
    return {
        **arch.sizes_to_hf(model, ids, _SIZES),
        "dropout": model.dropout_rate,
        "attention_dropout": model.attention_dropout_rate,
        "activation": arch.activation_to_hf(model),
    }


DISTILBERT = dataclasses.replace(
    BERT,
    model_type="distilbert",
    class_name="DistilBertForMaskedLM",
    from_hf_config=_from_distilbert,
    to_hf_config=_to_distilbert,
    weights=(
        weight("encoder/embeddings/token", "distilbert.embeddings.word_embeddings.weight"),
        weight("encoder/embeddings/position", "distilbert.embeddings.position_embeddings.weight"),
        weight("encoder/embeddings/norm", "distilbert.embeddings.LayerNorm"),
        linear("encoder/layers/qkv", *(f"{_LAYER}.attention.{name}_lin" for name in "qkv")),
        linear("encoder/layers/attention_out", f"{_LAYER}.attention.out_lin"),
        weight("encoder/layers/attention_norm", f"{_LAYER}.sa_layer_norm"),
        linear("encoder/layers/mlp_in", f"{_LAYER}.ffn.lin1"),
        linear("encoder/layers/mlp_out", f"{_LAYER}.ffn.lin2"),
        weight("encoder/layers/mlp_norm", f"{_LAYER}.output_layer_norm"),
        *arch.vocab_head("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
    ),
    tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    unused=("distilbert.embeddings.position_ids",),
)
