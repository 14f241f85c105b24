"""What the models compute: floating-point operations of a training step, for MFU."""

from flax_mlm.config.schema import Config, ModelConfig


def per_row(model: ModelConfig, seq_len: int, slots: int, vocab_rows: int) -> float:
    """Model FLOPs of one row of a training step: 2 per multiply-add, 3 times the forward pass. Recomputation
    (remat) does not count; windowed layers count their window."""
    d, f = model.hidden_size, model.intermediate_size
    matmuls = 4 * d * d + (3 if model.glu else 2) * d * f
    num_global = -(-model.num_layers // model.global_attn_every_n_layers)
    seen = num_global * seq_len + (model.num_layers - num_global) * min(seq_len, model.sliding_window + 1)
    e = model.embedding_size or d
    embed = d * e if model.embedding_size else 0
    forward = 2 * seq_len * (embed + model.num_layers * matmuls + 2 * d * seen) + 2 * slots * (d * e + e * vocab_rows)
    return 3.0 * forward


def per_row_of_rtd(config: Config, slots: int, vocab_rows: int) -> float:
    """The same of replaced-token detection: generator, encoder and the encoder's head."""
    length, d = config.data.seq_len, config.model.hidden_size
    generator = per_row(config.generator, length, slots, vocab_rows)
    return generator + per_row(config.model, length, 0, vocab_rows) + 3.0 * 2 * length * (d * d + d)
