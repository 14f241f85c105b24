"""BERT-large (arXiv:1810.04805), 335.2M parameters with the MLM head, with LAMB (arXiv:1904.00962).

    python -m flax_mlm.train --config=bert_large --workdir=runs/bert_large \
        --config.data.corpus=corpora/wiki --config.mesh.fsdp=16

For a TPU slice of 64 chips or four nodes of 8 GPUs. Not trained to the end here, so without expected time and loss.
"""

from ml_collections import ConfigDict

from flax_mlm.configs import bert_base


def get_config() -> ConfigDict:
    c = bert_base.get_config()
    c.model.num_layers = 24
    c.model.hidden_size = 1024
    c.model.num_heads = 16
    c.model.intermediate_size = 4096
    c.model.remat = "dots"

    c.optimizer.name = "lamb"
    c.optimizer.learning_rate = 2.5e-3  # this, the warm-up and the steps: that paper's for batches of 8,192
    c.optimizer.warmup_fraction = 0.05
    c.optimizer.beta2 = 0.999
    c.train.global_batch_size = 8192
    c.train.steps = 31_250
    return c
