"""ModernBERT-base (arXiv:2412.13663), 149.7M parameters with a vocabulary of 50,368, at 1,024 tokens a row.

    python -m flax_mlm.train --config=modernbert_base --workdir=runs/modernbert_base \
        --config.data.corpus=corpora/web

Optimizer, batch, learning rate and masks of the paper's first phase, for a twentieth of its length and with a decay at
the end. For a TPU slice of 16 chips or a node of 8 GPUs. Not trained to the end here, so without expected time and
loss.
"""

from ml_collections import ConfigDict

from flax_mlm.configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.seq_len = 1024
    c.tokenizer.vocab_size = 50_368

    c.model.num_layers = 22
    c.model.hidden_size = 768
    c.model.num_heads = 12
    c.model.intermediate_size = 1152
    c.model.max_positions = 8192
    c.model.position_embedding = "rope"
    c.model.norm_position = "pre"
    c.model.norm_eps = 1e-5
    c.model.use_bias = False
    c.model.glu = True
    c.model.type_vocab_size = 0
    c.model.global_attn_every_n_layers = 3
    c.model.sliding_window = 128
    c.model.rope_theta_global = 10_000.0  # 160,000 from the paper's second phase on, at 8,192 tokens
    c.model.rope_theta_local = 10_000.0
    c.model.dropout_rate = 0.0
    c.model.attention_dropout_rate = 0.0
    c.model.vocab_multiple_of = 128
    c.model.dtype = "bfloat16"

    c.objective.mask_rate = 0.3

    c.optimizer.name = "stable_adamw"
    c.optimizer.max_grad_norm = 0.0  # stable_adamw clips each tensor's update
    c.optimizer.learning_rate = 8e-4
    c.optimizer.schedule = "wsd"
    c.optimizer.warmup_fraction = 0.01
    c.optimizer.decay_fraction = 0.1
    c.optimizer.weight_decay = 0.0125  # 1e-5 per step at the peak, as in the paper
    c.train.global_batch_size = 4608
    c.train.gradient_accumulation_steps = 2
    c.train.steps = 20_000
    c.train.log_every = 50
    c.train.eval_every = 2000
    c.train.checkpoint_every = 500
    c.train.keep_period = 5000
    c.eval.batch_size = 512
    c.eval.max_rows = 5120
    return c
