"""Further pretraining of a Hugging Face folder on your own text.

    python -m flax_mlm.train --config=continue_pretraining --config.init_from=DIR --workdir=runs/continued \
        --config.data.source='text:my/*.txt'

The folder gives the shape of the model, the tokenizer, and what is `none` here: the peak learning rate, 5e-5 or, of
encoders narrower than 384, 1e-4; the length of rows, up to 512 tokens; and where the vocabulary head is new
(`reinit_head`), that it is trained alone at first, and faster. `--print_config` shows them.
docs/how-to/huggingface.md has what to expect.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flax_mlm.configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.seq_len = placeholder(int)

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = placeholder(float)
    c.optimizer.schedule = "linear"
    c.optimizer.head_first_steps = placeholder(int)
    c.optimizer.head_rate_factor = placeholder(float)
    c.optimizer.warmup_fraction = 0.1  # Adam's second moments are not known yet

    c.train.steps = 2000
    c.train.global_batch_size = 32
    c.train.log_every = 20
    c.train.eval_every = 200
    c.train.checkpoint_every = 200
    c.eval.batch_size = 32
    c.eval.max_rows = 1000
    return c
