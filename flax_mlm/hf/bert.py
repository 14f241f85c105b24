"""BERT (arXiv:1810.04805), RoBERTa (arXiv:1907.11692) with XLM-RoBERTa and CamemBERT, ALBERT (arXiv:1909.11942) and
both parts of ELECTRA (arXiv:2003.10555), as transformers has them."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from flax_mlm.config.schema import ModelConfig
from flax_mlm.hf import architecture as arch
from flax_mlm.hf.architecture import Architecture, HfConfig, Layout, SpecialIds, expect, linear, number, weight

_QKV = ("query", "key", "value")
_HEAD = "cls.predictions"


def _from_bert(config: HfConfig) -> dict[str, Any]:
    expect(config, position_embedding_type="absolute", tie_word_embeddings=True)
    fields = arch.sizes_from_hf(config) | {"activation": arch.activation_from_hf(config, "hidden_act")}
    fields["norm_eps"] = number(config, "layer_norm_eps", float, 1e-12)
    fields["type_vocab_size"] = number(config, "type_vocab_size", int, 2)
    fields |= dict(position_embedding="learned", norm_position="post", use_bias=True, glu=False)
    return fields | dict(embedding_size=0, share_layers=False, global_attn_every_n_layers=1)


def _to_bert(model: ModelConfig, ids: SpecialIds) -> dict[str, Any]:
    return {
        **arch.sizes_to_hf(model, ids),
        "layer_norm_eps": model.norm_eps,
        "type_vocab_size": model.type_vocab_size,
        "hidden_dropout_prob": model.dropout_rate,
        "attention_probs_dropout_prob": model.attention_dropout_rate,
        "hidden_act": arch.activation_to_hf(model),
        "position_embedding_type": "absolute",
        "is_decoder": False,
    }


def _tied(prefix: str, head: str) -> dict[str, str]:
    """Names the weights of a vocabulary head that repeat others: name -> name of the weight that it equals."""
    embedding = f"{prefix}embeddings.word_embeddings.weight"
    return {f"{head}.decoder.weight": embedding, f"{head}.decoder.bias": f"{head}.bias"}


BERT = Architecture(
    model_type="bert",
    class_name="BertForMaskedLM",
    objective="mlm",
    from_hf_config=_from_bert,
    to_hf_config=_to_bert,
    weights=(
        weight("encoder/embeddings/token", "bert.embeddings.word_embeddings.weight"),
        weight("encoder/embeddings/position", "bert.embeddings.position_embeddings.weight"),
        weight("encoder/embeddings/token_type", "bert.embeddings.token_type_embeddings.weight"),
        weight("encoder/embeddings/norm", "bert.embeddings.LayerNorm"),
        linear("encoder/layers/qkv", *(f"bert.encoder.layer.{{}}.attention.self.{name}" for name in _QKV)),
        linear("encoder/layers/attention_out", "bert.encoder.layer.{}.attention.output.dense"),
        weight("encoder/layers/attention_norm", "bert.encoder.layer.{}.attention.output.LayerNorm"),
        linear("encoder/layers/mlp_in", "bert.encoder.layer.{}.intermediate.dense"),
        linear("encoder/layers/mlp_out", "bert.encoder.layer.{}.output.dense"),
        weight("encoder/layers/mlp_norm", "bert.encoder.layer.{}.output.LayerNorm"),
        *arch.vocab_head(f"{_HEAD}.transform.dense", f"{_HEAD}.transform.LayerNorm", f"{_HEAD}.bias"),
    ),
    tied=_tied("bert.", _HEAD),
    unused=("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids"),
)

BERT_CAUSAL = dataclasses.replace(BERT, class_name="BertLMHeadModel", objective="clm")


def _with_prefix(prefix: str, rules: Iterable[arch.WeightRule]) -> tuple[arch.WeightRule, ...]:
    """Rewrites the weight table of a BERT for a model whose names begin with another prefix."""
    return tuple(r._replace(names=tuple(name.replace("bert.", prefix) for name in r.names)) for r in rules)


def _from_roberta(config: HfConfig) -> dict[str, Any]:
    expect(config, hidden_act="gelu")  # always that of the head
    fields = _from_bert(config)
    return {**fields, "max_positions": fields["max_positions"] - arch.position_offset(config)}


def _to_roberta(model: ModelConfig, ids: SpecialIds) -> dict[str, Any]:
    keys = _to_bert(model, ids)
    return {**keys, "max_position_embeddings": model.max_positions + arch.position_offset(keys)}


ROBERTA = dataclasses.replace(
    BERT,
    model_type="roberta",
    class_name="RobertaForMaskedLM",
    from_hf_config=_from_roberta,
    to_hf_config=_to_roberta,
    weights=(
        *_with_prefix("roberta.", BERT.weights[:1]),
        # Position p has row p + pad_token_id + 1.
        weight("encoder/embeddings/position", "roberta.embeddings.position_embeddings.weight", layout=Layout.OFFSET),
        *_with_prefix("roberta.", BERT.weights[2:10]),
        *arch.vocab_head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    ),
    tied=_tied("roberta.", "lm_head"),
    unused=("roberta.pooler.", "roberta.embeddings.position_ids"),
)

ROBERTA_CAUSAL = dataclasses.replace(ROBERTA, class_name="RobertaForCausalLM", objective="clm")

# The same weights under the same names.
XLM_ROBERTA = dataclasses.replace(ROBERTA, model_type="xlm-roberta", class_name="XLMRobertaForMaskedLM")
CAMEMBERT = dataclasses.replace(ROBERTA, model_type="camembert", class_name="CamembertForMaskedLM")


def _from_albert(config: HfConfig) -> dict[str, Any]:
    expect(config, num_hidden_groups=1, inner_group_num=1)
    return {**_from_bert(config), "embedding_size": number(config, "embedding_size"), "share_layers": True}


def _to_albert(model: ModelConfig, ids: SpecialIds) -> dict[str, Any]:
    keys = {**_to_bert(model, ids), "embedding_size": model.embedding_size}
    del keys["is_decoder"]
    return {**keys, "num_hidden_groups": 1, "inner_group_num": 1}


_ALBERT_LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"

ALBERT = dataclasses.replace(
    BERT,
    model_type="albert",
    class_name="AlbertForMaskedLM",
    from_hf_config=_from_albert,
    to_hf_config=_to_albert,
    weights=(
        *_with_prefix("albert.", BERT.weights[:4]),
        linear("encoder/projection", "albert.encoder.embedding_hidden_mapping_in"),
        linear("encoder/layers/qkv", *(f"{_ALBERT_LAYER}.attention.{name}" for name in _QKV)),
        linear("encoder/layers/attention_out", f"{_ALBERT_LAYER}.attention.dense"),
        weight("encoder/layers/attention_norm", f"{_ALBERT_LAYER}.attention.LayerNorm"),
        linear("encoder/layers/mlp_in", f"{_ALBERT_LAYER}.ffn"),
        linear("encoder/layers/mlp_out", f"{_ALBERT_LAYER}.ffn_output"),
        weight("encoder/layers/mlp_norm", f"{_ALBERT_LAYER}.full_layer_layer_norm"),
        *arch.vocab_head("predictions.dense", "predictions.LayerNorm", "predictions.bias"),
    ),
    tied=_tied("albert.", "predictions"),
    unused=("albert.pooler", "sop_classifier.", "albert.embeddings.position_ids"),
)


def _from_electra(config: HfConfig) -> dict[str, Any]:
    expect(config, hidden_act="gelu")  # always that of the generator's head
    fields = _from_bert(config)
    width = number(config, "embedding_size", int, 128)
    return {**fields, "embedding_size": 0 if width == fields["hidden_size"] else width}


def _to_electra(model: ModelConfig, ids: SpecialIds) -> dict[str, Any]:
    return {**_to_bert(model, ids), "embedding_size": model.embedding_size or model.hidden_size}


ELECTRA_GENERATOR = dataclasses.replace(
    BERT,
    model_type="electra",
    class_name="ElectraForMaskedLM",
    from_hf_config=_from_electra,
    to_hf_config=_to_electra,
    weights=(
        *_with_prefix("electra.", BERT.weights[:10]),
        linear("encoder/projection", "electra.embeddings_project"),  # absent where embeddings are as wide as layers
        *arch.vocab_head("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias"),
    ),
    tied={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    unused=("electra.embeddings.position_ids",),
)

ELECTRA = dataclasses.replace(
    ELECTRA_GENERATOR,
    class_name="ElectraForPreTraining",
    objective="rtd",
    weights=(
        *ELECTRA_GENERATOR.weights[:11],
        linear("head/dense", "discriminator_predictions.dense"),
        weight("head/detector", "discriminator_predictions.dense_prediction.weight"),
        weight("head/detector_bias", "discriminator_predictions.dense_prediction.bias"),
    ),
    tied={},
)
