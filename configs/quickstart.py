"""The main job: a small encoder on the built-in corpus, five minutes on two CPU cores."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.seq_len = 64
    c.tokenizer.vocab_size = 4096
    c.model.num_layers = 3
    c.model.hidden_size = 128
    c.model.num_heads = 2
    c.model.intermediate_size = 512
    c.model.scan_layers = False
    c.model.dropout_rate = 0.0
    c.model.attention_dropout_rate = 0.0
    c.train.global_batch_size = 64
    c.train.steps = 200
    c.train.log_every = 20
    c.train.checkpoint_every = 50
    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 3e-3
    return c
