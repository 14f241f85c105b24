"""ModernBERT (arXiv:2412.13663), and its decoder for causal models, as transformers has them."""

import dataclasses
from typing import Any

from flax_mlm.hf.architecture import Architecture, Array, Linear, Norm, Row


def _older(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 with the keys of 4, which both read."""
    if types := config.get("layer_types"):
        every = next((i for i, kind in enumerate(types) if i and kind == "full_attention"), len(types))
        pattern = ["full_attention" if i % every == 0 else "sliding_attention" for i in range(len(types))]
        config = {**config, "global_attn_every_n_layers": every if types == pattern else f"irregular: {types}"}
    ropes = config.get("rope_parameters") or {}
    for kind, ours in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta")):
        if rope := ropes.get(kind):
            plain = rope.get("rope_type", "default") == "default"
            config = {**config, ours: rope["rope_theta"] if plain else f"of type {rope['rope_type']}"}
    if config.get("local_rope_theta") is None and "global_rope_theta" in config:
        config = {**config, "local_rope_theta": config["global_rope_theta"]}
    return config


MODERNBERT = Architecture(
    name="modernbert",
    model_type="modernbert",
    class_name="ModernBertForMaskedLM",
    objective="mlm",
    base="model.",
    fields={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "norm_eps": "norm_eps",
        "use_bias": "attention_bias|mlp_bias|norm_bias|classifier_bias",
        "global_attn_every_n_layers": "global_attn_every_n_layers",
        "sliding_window": "local_attention",
        "rope_theta_global": "global_rope_theta",
        "rope_theta_local": "local_rope_theta",
    },
    training={
        "dropout_rate": "mlp_dropout|embedding_dropout",
        "attention_dropout_rate": "attention_dropout",
        "initializer_range": "initializer_range",
    },
    ours={
        "position_embedding": "rope",
        "norm_position": "pre",
        "glu": True,
        "type_vocab_size": 0,
        "embedding_size": 0,
        "share_layers": False,
    },
    theirs={
        "hidden_activation": ("gelu",),
        "classifier_activation": ("gelu",),
        "decoder_bias": (True,),
        "tie_word_embeddings": (True,),
    },
    rows=(
        Row("encoder/embeddings/token", "model.embeddings.tok_embeddings.weight", Array),
        Row("encoder/embeddings/norm", "model.embeddings.norm", Norm),
        Row("encoder/attention_norms", "model.layers.{}.attn_norm", Norm),
        Row("encoder/layers/qkv", "model.layers.{}.attn.Wqkv", Linear),
        Row("encoder/layers/attention_out", "model.layers.{}.attn.Wo", Linear),
        Row("encoder/layers/mlp_norm", "model.layers.{}.mlp_norm", Norm),
        Row("encoder/layers/mlp_in", "model.layers.{}.mlp.Wi", Linear),
        Row("encoder/layers/mlp_out", "model.layers.{}.mlp.Wo", Linear),
        Row("encoder/final_norm", "model.final_norm", Norm),
        Row("head/dense", "head.dense", Linear),
        Row("head/norm", "head.norm", Norm),
        Row("head/decoder_bias", "decoder.bias", Array),
    ),
    same={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    unused=(),
    more={},
    normalise=_older,
    defaults={
        "norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "classifier_bias": False,
        "global_attn_every_n_layers": 3,
        "local_attention": 128,
        "global_rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0,
    },
)

_DECODER_NAMES = {
    "encoder/layers/qkv": "model.layers.{}.attn.q_proj|k_proj|v_proj",
    "head/dense": "lm_head.dense",
    "head/norm": "lm_head.norm",
}

DECODER = dataclasses.replace(
    MODERNBERT,
    name="modernbert-decoder",
    model_type="modernbert-decoder",
    class_name="ModernBertDecoderForCausalLM",
    objective="clm",
    more={"local_attention": 2},  # the decoder's window leaves out the farthest token on each side
    rows=tuple(row._replace(theirs=_DECODER_NAMES.get(row.ours, row.theirs)) for row in MODERNBERT.rows),
)
