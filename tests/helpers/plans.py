"""Configs to plan for."""

from flax_mlm.config.load import build
from flax_mlm.config.schema import Config


def bert(**changes) -> Config:
    from flax_mlm.configs import bert_base

    values = bert_base.get_config()
    values.update_from_flattened_dict(changes)
    return build(values)


TINY = {
    "data.seq_len": 32, "tokenizer.vocab_size": 512, "model.num_layers": 5, "model.hidden_size": 64,
    "model.num_heads": 2, "model.intermediate_size": 128, "model.scan_layers": True, "model.dtype": "float32",
    "train.global_batch_size": 16,
}  # fmt: skip
