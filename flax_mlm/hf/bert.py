"""BERT (arXiv:1810.04805), RoBERTa (arXiv:1907.11692), ALBERT (arXiv:1909.11942) and both parts of ELECTRA
(arXiv:2003.10555), as transformers has them."""

import dataclasses
from collections.abc import Iterable, Iterator

from flax_mlm.hf.architecture import Architecture, Array, Linear, Norm, Offset, Row

BERT = Architecture(
    name="bert",
    model_type="bert",
    class_name="BertForMaskedLM",
    objective="mlm",
    base="bert.",
    fields={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "norm_eps": "layer_norm_eps",
        "type_vocab_size": "type_vocab_size",
    },
    training={
        "dropout_rate": "hidden_dropout_prob",
        "attention_dropout_rate": "attention_probs_dropout_prob",
        "initializer_range": "initializer_range",
    },
    ours={
        "position_embedding": "learned",
        "norm_position": "post",
        "use_bias": True,
        "glu": False,
        "embedding_size": 0,
        "share_layers": False,
        "global_attn_every_n_layers": 1,
    },
    theirs={
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "tie_word_embeddings": (True,),
        "is_decoder": (False, True),
    },
    rows=(
        Row("encoder/embeddings/token", "bert.embeddings.word_embeddings.weight", Array),
        Row("encoder/embeddings/position", "bert.embeddings.position_embeddings.weight", Array),
        Row("encoder/embeddings/token_type", "bert.embeddings.token_type_embeddings.weight", Array),
        Row("encoder/embeddings/norm", "bert.embeddings.LayerNorm", Norm),
        Row("encoder/layers/qkv", "bert.encoder.layer.{}.attention.self.query|key|value", Linear),
        Row("encoder/layers/attention_out", "bert.encoder.layer.{}.attention.output.dense", Linear),
        Row("encoder/layers/attention_norm", "bert.encoder.layer.{}.attention.output.LayerNorm", Norm),
        Row("encoder/layers/mlp_in", "bert.encoder.layer.{}.intermediate.dense", Linear),
        Row("encoder/layers/mlp_out", "bert.encoder.layer.{}.output.dense", Linear),
        Row("encoder/layers/mlp_norm", "bert.encoder.layer.{}.output.LayerNorm", Norm),
        Row("head/dense", "cls.predictions.transform.dense", Linear),
        Row("head/norm", "cls.predictions.transform.LayerNorm", Norm),
        Row("head/decoder_bias", "cls.predictions.bias", Array),
    ),
    same={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    unused=("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids"),
    more={},
    normalise=lambda config: config,
    defaults={"layer_norm_eps": 1e-12, "type_vocab_size": 2},
)

BERT_CAUSAL = dataclasses.replace(
    BERT,
    class_name="BertLMHeadModel",
    objective="clm",
    theirs={**BERT.theirs, "is_decoder": (True, False)},
)


def _renamed(base: str, rows: Iterable[Row]) -> Iterator[Row]:
    """Rows of a BERT, for a model whose names begin otherwise."""
    return (row._replace(theirs=row.theirs.replace("bert.", base)) for row in rows)


ROBERTA = dataclasses.replace(
    BERT,
    name="roberta",
    model_type="roberta",
    class_name="RobertaForMaskedLM",
    base="roberta.",
    rows=(
        *_renamed("roberta.", BERT.rows[:1]),
        # Position p has row p + pad_token_id + 1.
        Row("encoder/embeddings/position", "roberta.embeddings.position_embeddings.weight", Offset),
        *_renamed("roberta.", BERT.rows[2:10]),
        Row("head/dense", "lm_head.dense", Linear),
        Row("head/norm", "lm_head.layer_norm", Norm),
        Row("head/decoder_bias", "lm_head.bias", Array),
    ),
    same={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    unused=("roberta.pooler.", "roberta.embeddings.position_ids"),
)

ROBERTA_CAUSAL = dataclasses.replace(
    ROBERTA, class_name="RobertaForCausalLM", objective="clm", theirs=BERT_CAUSAL.theirs
)

# Embeddings may be narrower than the layers.
_FACTORED_FIELDS = {**BERT.fields, "embedding_size": "embedding_size"}
_FACTORED_OURS = {name: value for name, value in BERT.ours.items() if name != "embedding_size"}

_ALBERT_LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"

ALBERT = dataclasses.replace(
    BERT,
    name="albert",
    model_type="albert",
    class_name="AlbertForMaskedLM",
    base="albert.",
    fields=_FACTORED_FIELDS,
    ours={**_FACTORED_OURS, "share_layers": True},
    theirs={
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "tie_word_embeddings": (True,),
        "num_hidden_groups": (1,),
        "inner_group_num": (1,),
    },
    rows=(
        Row("encoder/embeddings/token", "albert.embeddings.word_embeddings.weight", Array),
        Row("encoder/embeddings/position", "albert.embeddings.position_embeddings.weight", Array),
        Row("encoder/embeddings/token_type", "albert.embeddings.token_type_embeddings.weight", Array),
        Row("encoder/embeddings/norm", "albert.embeddings.LayerNorm", Norm),
        Row("encoder/projection", "albert.encoder.embedding_hidden_mapping_in", Linear),
        Row("encoder/layers/qkv", f"{_ALBERT_LAYER}.attention.query|key|value", Linear),
        Row("encoder/layers/attention_out", f"{_ALBERT_LAYER}.attention.dense", Linear),
        Row("encoder/layers/attention_norm", f"{_ALBERT_LAYER}.attention.LayerNorm", Norm),
        Row("encoder/layers/mlp_in", f"{_ALBERT_LAYER}.ffn", Linear),
        Row("encoder/layers/mlp_out", f"{_ALBERT_LAYER}.ffn_output", Linear),
        Row("encoder/layers/mlp_norm", f"{_ALBERT_LAYER}.full_layer_layer_norm", Norm),
        Row("head/dense", "predictions.dense", Linear),
        Row("head/norm", "predictions.LayerNorm", Norm),
        Row("head/decoder_bias", "predictions.bias", Array),
    ),
    same={
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
    unused=("albert.pooler", "sop_classifier.", "albert.embeddings.position_ids"),
)

# An ELECTRA whose embeddings are as wide as its layers has no projection; ours has embedding_size 0 then.
ELECTRA_GENERATOR = dataclasses.replace(
    BERT,
    name="electra",
    model_type="electra",
    class_name="ElectraForMaskedLM",
    base="electra.",
    fields=_FACTORED_FIELDS,
    ours=_FACTORED_OURS,
    rows=(
        *_renamed("electra.", BERT.rows[:10]),
        Row("encoder/projection", "electra.embeddings_project", Linear),
        Row("head/dense", "generator_predictions.dense", Linear),
        Row("head/norm", "generator_predictions.LayerNorm", Norm),
        Row("head/decoder_bias", "generator_lm_head.bias", Array),
    ),
    same={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    unused=("electra.embeddings.position_ids",),
    defaults={**BERT.defaults, "embedding_size": 128},
)

ELECTRA = dataclasses.replace(
    ELECTRA_GENERATOR,
    class_name="ElectraForPreTraining",
    objective="rtd",
    rows=(
        *ELECTRA_GENERATOR.rows[:11],
        Row("head/dense", "discriminator_predictions.dense", Linear),
        Row("head/detector", "discriminator_predictions.dense_prediction.weight", Array),
        Row("head/detector_bias", "discriminator_predictions.dense_prediction.bias", Array),
    ),
    same={},
)
