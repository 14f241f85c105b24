"""ELECTRA-small (arXiv:2003.10555): an encoder of 13.5M parameters trained with replaced-token detection.

    python -m flax_mlm.train --config=electra_small --workdir=runs/electra_small \
        --config.data.corpus=corpora/wiki

Sizes and settings from table 6 of the paper, where it trained for four days on one GPU. Not trained to the end here, so
without expected time and loss.
"""

from ml_collections import ConfigDict

from flax_mlm.configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.seq_len = 128
    c.tokenizer.vocab_size = 30_522

    c.model.num_layers = 12
    c.model.hidden_size = 256
    c.model.num_heads = 4
    c.model.intermediate_size = 1024
    c.model.embedding_size = 128
    c.model.max_positions = 512
    c.model.vocab_multiple_of = 128  # 30,592 rows
    c.model.dtype = "bfloat16"

    c.objective.name = "rtd"
    c.objective.mask_rate = 0.15
    c.objective.mask_replace_prob = 0.85  # the other 15% stay unchanged, as in the authors' code
    c.objective.random_replace_prob = 0.0
    c.objective.generator_size = 0.25
    c.objective.generator_depth = 1.0
    c.objective.embedding_sharing = "shared"
    c.objective.discriminator_weight = 50.0

    c.optimizer.learning_rate = 5e-4
    c.optimizer.beta2 = 0.999
    c.optimizer.warmup_fraction = 0.01
    c.train.global_batch_size = 128
    c.train.steps = 1_000_000
    c.train.log_every = 100
    c.train.eval_every = 10_000
    c.train.checkpoint_every = 5000
    c.train.keep_period = 100_000
    c.eval.max_rows = 20_480
    return c
