"""ModernBERT-large (arXiv:2412.13663), 395.9M parameters with a vocabulary of 50,368, at 1,024 tokens a row.

    python -m flax_mlm.train --config=modernbert_large --workdir=runs/modernbert_large \
        --config.data.corpus=corpora/web --config.mesh.fsdp=16

For a TPU slice of 64 chips or four nodes of 8 GPUs. Not trained to the end here, so without expected time and loss.
"""

from ml_collections import ConfigDict

from flax_mlm.configs import modernbert_base


def get_config() -> ConfigDict:
    c = modernbert_base.get_config()
    c.model.num_layers = 28
    c.model.hidden_size = 1024
    c.model.num_heads = 16
    c.model.intermediate_size = 2624
    c.model.remat = "dots"

    c.optimizer.learning_rate = 5e-4
    c.optimizer.weight_decay = 0.02
    c.train.global_batch_size = 4928
    c.train.gradient_accumulation_steps = 1
    return c
