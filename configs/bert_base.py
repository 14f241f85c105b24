"""BERT-base (arXiv:1810.04805), 109.5M parameters with the MLM head, at 128 tokens a row.

    python -m flax_mlm.train --config=bert_base --workdir=runs/bert_base \
        --config.data.corpus=corpora/wiki

For a TPU slice of 16 chips or a node of 8 GPUs. Prepare the corpus first, with the same config
(`python -m flax_mlm.prepare --config=bert_base --config.data.source=... --output=...`).
Not trained to the end here, so without expected time and loss.
"""

from ml_collections import ConfigDict

from flax_mlm.configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.seq_len = 128
    c.tokenizer.vocab_size = 30_522

    c.model.num_layers = 12
    c.model.hidden_size = 768
    c.model.num_heads = 12
    c.model.intermediate_size = 3072
    c.model.max_positions = 512
    c.model.vocab_multiple_of = 128  # 30,592 rows
    c.model.dtype = "bfloat16"

    # The paper trains for one million steps of 256 rows. The same rows in larger batches at a learning rate of 7e-4
    # gave a lower perplexity in RoBERTa (arXiv:1907.11692, table 3), which also uses beta2 = 0.98.
    c.optimizer.learning_rate = 7e-4
    c.train.global_batch_size = 2048
    c.train.steps = 125_000
    c.train.log_every = 50
    c.train.eval_every = 5000
    c.train.checkpoint_every = 1000
    c.train.keep_period = 25_000
    c.eval.batch_size = 2048
    c.eval.max_rows = 20_480
    return c
