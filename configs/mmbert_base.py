"""mmBERT-base (arXiv:2509.06888), 307M parameters with the 256,000 tokens of Gemma 2: many languages, annealed.

    python -m flax_mlm.train --config=mmbert_base:FOLDER --workdir=runs/mmbert_base

Three phases, of 2.3, 0.6 and 0.1 parts of 3 (in the paper trillions of tokens):

    phase              rows of  mask rate  sampling_alpha  corpora of FOLDER             languages in the paper
    pre-training         1,024        30%             0.7  1024/*                                            60
    context extension    8,192        15%             0.5  8192/*                                           110
    decay                8,192         5%             0.3  8192/* and 8192_decay/*                        1,833

Each corpus is a language, prepared with the same tokenizer and data.seq_len=1024 or 8192; docs/how-to/languages.md
shows how. Without a FOLDER the config has the same phases on one source. Optimizer and rates are those of the paper's
published configs, for a thirtieth of its length and with a longer warm-up. Its batch grows over the first 60 billion
tokens, its decay follows a square root; here the batch is constant, and the decay linear. For a TPU slice of 16 chips
or a node of 8 GPUs. Not trained to the end here, so without expected time and loss.
"""

from ml_collections import ConfigDict

from flax_mlm.configs import modernbert_base


def get_config(folder: str = "") -> ConfigDict:
    c = modernbert_base.get_config()
    c.data.corpus = f"{folder}/1024/*" if folder else ""
    c.data.sampling_alpha = 0.7
    c.tokenizer.vocab_size = 256_000

    c.optimizer.beta2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.1  # 8e-5 per step at the peak, as in the paper
    c.optimizer.decay_fraction = 0.033  # the third phase
    c.optimizer.final_lr_fraction = 0.02

    c.train.gradient_accumulation_steps = 8
    c.train.logits_chunks = 16  # of 256,000 logits for each prediction
    second = f"data.corpus={folder}/8192/*" if folder else "data.seq_len=8192"
    third = f"data.corpus={folder}/8192/*,{folder}/8192_decay/*, " if folder else ""
    c.train.phases = (
        f"76.7%: {second}, train.global_batch_size=576, "  # as many tokens in a batch as before
        "train.gradient_accumulation_steps=12, "
        "model.rope_theta_global=160_000, model.rope_theta_local=160_000, "
        "objective.mask_rate=0.15, data.sampling_alpha=0.5; "
        f"96.7%: {third}objective.mask_rate=0.05, data.sampling_alpha=0.3"
    )
    return c
