"""A 4-layer, 256-wide encoder for your own text: 35 to 60 minutes on two CPU cores.

Expected held-out loss: 3.57 nats on 40 MB of Wikipedia (unigram entropy: 7.27).

    python -m flax_mlm.train --config=small --config.data.source='text:my/*.txt.gz' --workdir=runs/small
"""

from ml_collections import ConfigDict

from flax_mlm.configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.seq_len = 128
    c.tokenizer.vocab_size = 8192

    c.model.num_layers = 4
    c.model.hidden_size = 256
    c.model.num_heads = 4
    c.model.intermediate_size = 704  # GeGLU of about the size of a plain MLP of 1024
    c.model.position_embedding = "rope"
    c.model.norm_position = "pre"
    c.model.norm_eps = 1e-5
    c.model.use_bias = False
    c.model.glu = True
    c.model.type_vocab_size = 0
    c.model.dropout_rate = 0.0  # a short run reads its text about once and does not overfit
    c.model.attention_dropout_rate = 0.0

    c.objective.mask_rate = 0.3  # more predictions per row; phases lower it to the rate of evaluation
    c.train.phases = "0%: objective.mask_rate->0.15"

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 6e-3
    c.optimizer.weight_decay = 0.0

    c.train.steps = 2000
    c.train.global_batch_size = 32
    c.train.eval_every = 200
    c.train.checkpoint_every = 100
    c.eval.batch_size = 64
    c.eval.max_rows = 2000
    return c
