"""Floating-point operations of a training step, for MFU."""

from flax_mlm.config.schema import Config, ModelConfig


def per_row(model: ModelConfig, seq_len: int, num_predictions: int, vocab_rows: int) -> float:
    """Counts the model FLOPs of one row of a training step: 2 per multiply-add, 3 times the forward pass.

    Recomputation (remat) does not count; windowed layers count their window.
    """
    width, inner = model.hidden_size, model.intermediate_size
    layer_matmuls = 4 * width * width + (3 if model.glu else 2) * width * inner
    num_global = -(-model.num_layers // model.global_attn_every_n_layers)
    num_local = model.num_layers - num_global
    keys = num_global * seq_len + num_local * min(seq_len, model.sliding_window + 1)  # per query, in all layers
    embedding_width = model.embedding_size or width
    projection = width * embedding_width if model.embedding_size else 0
    encoder = seq_len * (projection + model.num_layers * layer_matmuls + 2 * width * keys)
    head = num_predictions * (width * embedding_width + embedding_width * vocab_rows)
    return 3.0 * 2 * (encoder + head)


def per_row_of_rtd(config: Config, num_predictions: int, vocab_rows: int) -> float:
    """Counts `per_row` for replaced-token detection: generator, encoder and detection head."""
    length, width = config.data.seq_len, config.model.hidden_size
    generator = per_row(config.generator, length, num_predictions, vocab_rows)
    detection_head = 3.0 * 2 * length * (width * width + width)
    return generator + per_row(config.model, length, 0, vocab_rows) + detection_head
