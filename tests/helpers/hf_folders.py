"""Hugging Face folders of random weights, and what `train` makes of them."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from flax_mlm.config.load import build
from flax_mlm.config.schema import ModelConfig
from flax_mlm.configs import base
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.hf import bert, folder, modernbert, tokenizer_json
from flax_mlm.hf.distilbert import DISTILBERT
from flax_mlm.hf.weights import param_mappings, params_to_tensors
from flax_mlm.inference.config import apply_folder
from flax_mlm.inference.load import start_params
from flax_mlm.model import heads
from flax_mlm.training.step import build_training

SMALL = {"num_layers": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "max_positions": 64}


BERT = {"norm_eps": 1e-12}


MODERN = {
    "position_embedding": "rope", "norm_position": "pre", "norm_eps": 1e-5, "use_bias": False, "glu": True,
    "type_vocab_size": 0, "global_attn_every_n_layers": 3, "sliding_window": 16,
}  # fmt: skip


SHAPES = {
    "bert": (bert.BERT, BERT),
    "roberta": (bert.ROBERTA, BERT),
    "albert": (bert.ALBERT, {**BERT, "embedding_size": 16, "share_layers": True}),
    "albert v2": (bert.ALBERT, {**BERT, "embedding_size": 16, "share_layers": True, "activation": "gelu_tanh"}),
    "distilbert": (DISTILBERT, {**BERT, "type_vocab_size": 0}),
    "xlm-roberta": (bert.XLM_ROBERTA, {**BERT, "type_vocab_size": 1}),
    "camembert": (bert.CAMEMBERT, {**BERT, "type_vocab_size": 1}),
    "electra": (bert.ELECTRA_GENERATOR, {**BERT, "embedding_size": 16}),
    "modernbert": (modernbert.MODERNBERT, MODERN),
    "modernbert with biases": (modernbert.MODERNBERT, {**MODERN, "use_bias": True}),
    "modernbert-decoder": (modernbert.DECODER, MODERN),
}


def model_config(**fields) -> ModelConfig:
    return dataclasses.replace(build(base.get_config()).model, **SMALL, **fields)


def written(where: Path, kind: str, tokenizer: Tokenizer, seed: int = 0) -> Path:
    """A Hugging Face folder of random weights, as `export` would write it."""
    architecture, fields = SHAPES[kind]
    model = model_config(**fields)
    net = heads.language_model(model, tokenizer.vocab_size)
    params = jax.device_get(net.init(jax.random.key(seed)))
    params = jax.tree.map(lambda x: x + np.random.default_rng(0).normal(0, 0.01, x.shape).astype(np.float32), params)
    where.mkdir()
    mappings = list(param_mappings(architecture, params, net.dims, model.num_layers))
    folder.write_tensors(where / "model.safetensors", params_to_tensors(mappings, params, tokenizer.pad_id + 1))
    settings = folder.config_json(architecture, model, tokenizer.vocab_size, tokenizer)
    (where / "config.json").write_text(json.dumps(settings))
    (where / "tokenizer.json").write_bytes(tokenizer_json.content(tokenizer, 1))
    for name, content in (
        ("tokenizer_config.json", tokenizer_json.settings(tokenizer, model.max_positions, model.type_vocab_size)),
        ("special_tokens_map.json", tokenizer_json.special_tokens(tokenizer)),
    ):
        (where / name).write_text(json.dumps(content))
    return where


def opened(path: Path, **changes):
    """What `train` makes of the folder: config, steps, tokenizer, and the lines it logs."""
    c = base.get_config()
    c.init_from, c.tokenizer.extra_tokens_file = str(path), str(changes.pop("extend", ""))
    c.reinit_head = changes.pop("reinit_head", False)
    c.optimizer.averaging = changes.pop("averaging", "none")
    c.data.seq_len = 32
    apply_folder(c)
    config = build(c)
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.extra_tokens_file)
    mesh = make_mesh(config.mesh)
    return config, build_training(config, tokenizer.vocab_size, mesh), tokenizer, mesh


def started(path: Path, **changes):
    config, training, tokenizer, mesh = opened(path, **changes)
    log: list[str] = []
    with jax.set_mesh(mesh):
        fresh = training.init().params
        state = training.init(start_params(config, fresh, training.forward.model.dims, tokenizer, log.append))
    return config, training, state, log
