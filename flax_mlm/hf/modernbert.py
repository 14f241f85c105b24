"""ModernBERT (arXiv:2412.13663), and its decoder for causal models, as transformers has them."""

import dataclasses
from typing import Any

from flax_mlm.config.schema import ModelConfig
from flax_mlm.hf import architecture as arch
from flax_mlm.hf.architecture import Architecture, HfConfig, SpecialIds, expect, linear, number, weight

_BIASES = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")


def _from_modernbert(config: HfConfig) -> dict[str, Any]:
    expect(config, hidden_activation="gelu", classifier_activation="gelu", decoder_bias=True, tie_word_embeddings=True)
    use_bias = config.get("attention_bias", False)
    for key in _BIASES:
        if type(value := config.get(key, False)) is not bool or value != use_bias:
            raise ValueError(f"{key} = {value!r}; expected a bool, the same for {', '.join(_BIASES)}")
    theta = _rope_theta(config, "full_attention", "global_rope_theta", 160_000.0)
    return {
        **arch.sizes_from_hf(config),
        "norm_eps": number(config, "norm_eps", float, 1e-5),
        "use_bias": use_bias,
        "global_attn_every_n_layers": _global_period(config),
        "sliding_window": number(config, "local_attention", int, 128),
        "rope_theta_global": theta,
        "rope_theta_local": _rope_theta(config, "sliding_attention", "local_rope_theta", 10_000.0, theta),
        "position_embedding": "rope",
        "norm_position": "pre",
        "glu": True,
        "activation": "gelu",
        "type_vocab_size": 0,
        "embedding_size": 0,
        "share_layers": False,
    }


def _global_period(config: HfConfig) -> int:
    """Returns n where every n-th layer attends to all tokens: a number up to transformers 4, a list of layers in 5."""
    if (layers := config.get("layer_types")) is None:
        return number(config, "global_attn_every_n_layers", int, 3)
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"layer_types = {layers!r}; expected a list of full_attention and sliding_attention")
    period = next((i for i, layer in enumerate(layers) if i and layer == "full_attention"), len(layers))
    expected = ["sliding_attention" if i % period else "full_attention" for i in range(len(layers))]
    if layers != expected:
        raise ValueError(f"layer_types = {layers!r}; expected full_attention at every n-th layer, from the first")
    return period


def _rope_theta(config: HfConfig, layer_type: str, key: str, default: float, if_null: float | None = None) -> float:
    """Returns the base of a kind of layer's rotary embedding: under a key up to transformers 4, in a table in 5."""
    rope = config
    for name in ("rope_parameters", layer_type):
        rope = rope.get(name) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{name} = {rope!r}; expected an object")
    expect(rope, rope_type="default")
    if "rope_theta" in rope:
        return number(rope, "rope_theta", float)
    if config.get(key, default) is None and if_null is not None:
        return if_null
    return number(config, key, float, default)


def _to_modernbert(model: ModelConfig, ids: SpecialIds) -> dict[str, Any]:
    return {
        **arch.sizes_to_hf(model, ids),
        "norm_eps": model.norm_eps,
        **dict.fromkeys(_BIASES, model.use_bias),
        "global_attn_every_n_layers": model.global_attn_every_n_layers,
        "local_attention": model.sliding_window,
        "global_rope_theta": model.rope_theta_global,
        "local_rope_theta": model.rope_theta_local,
        "mlp_dropout": model.dropout_rate,
        "embedding_dropout": model.dropout_rate,
        "attention_dropout": model.attention_dropout_rate,
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "decoder_bias": True,
        "cls_token_id": ids.cls_id,
        "sep_token_id": ids.sep_id,
    }


MODERNBERT = Architecture(
    model_type="modernbert",
    class_name="ModernBertForMaskedLM",
    objective="mlm",
    from_hf_config=_from_modernbert,
    to_hf_config=_to_modernbert,
    weights=(
        weight("encoder/embeddings/token", "model.embeddings.tok_embeddings.weight"),
        weight("encoder/embeddings/norm", "model.embeddings.norm"),
        weight("encoder/attention_norms", "model.layers.{}.attn_norm"),
        linear("encoder/layers/qkv", "model.layers.{}.attn.Wqkv"),
        linear("encoder/layers/attention_out", "model.layers.{}.attn.Wo"),
        weight("encoder/layers/mlp_norm", "model.layers.{}.mlp_norm"),
        linear("encoder/layers/mlp_in", "model.layers.{}.mlp.Wi"),
        linear("encoder/layers/mlp_out", "model.layers.{}.mlp.Wo"),
        weight("encoder/final_norm", "model.final_norm"),
        *arch.vocab_head("head.dense", "head.norm", "decoder.bias"),
    ),
    tied={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    unused=(),
)


# The decoder's window leaves out the farthest token on each side.
def _from_decoder(config: HfConfig) -> dict[str, Any]:
    fields = _from_modernbert(config)
    return {**fields, "sliding_window": fields["sliding_window"] - 2}


def _to_decoder(model: ModelConfig, ids: SpecialIds) -> dict[str, Any]:
    return {**_to_modernbert(model, ids), "local_attention": model.sliding_window + 2}


DECODER = dataclasses.replace(
    MODERNBERT,
    model_type="modernbert-decoder",
    class_name="ModernBertDecoderForCausalLM",
    objective="clm",
    from_hf_config=_from_decoder,
    to_hf_config=_to_decoder,
    weights=(
        *MODERNBERT.weights[:3],
        linear("encoder/layers/qkv", *(f"model.layers.{{}}.attn.{x}_proj" for x in "qkv")),
        *MODERNBERT.weights[4:9],
        *arch.vocab_head("lm_head.dense", "lm_head.norm", "decoder.bias"),
    ),
)
