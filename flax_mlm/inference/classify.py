"""Outputs of a task's head for rows of tokens."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flax_mlm.inference import embeddings
from flax_mlm.inference.load import LoadedModel, OnBatch, Params
from flax_mlm.inference.task_head import TaskHead
from flax_mlm.model.heads import apply_task_head


def head_outputs(
    model: LoadedModel, head: TaskHead, params: Params, tokens_BL: jax.Array, keys_B: Any = None
) -> jax.Array:
    """Computes outputs, float32 (B, C), or (B, L, C) of a head for tokens. Call it inside `jax.jit`.

    Args:
      params: dict of the encoder's parameters, `encoder`, and the head's, `task`.
      keys_B: keys of dropout, one a row; None disables dropout.
    """
    rate = model.config.finetune.dropout_rate
    x = embeddings.hidden_states(model, params, tokens_BL, keys_B)
    if not head.per_token:
        x = embeddings.pool(model, x, tokens_BL)

    def dropout(x: jax.Array) -> jax.Array:
        if keys_B is None or not rate:
            return x
        keep = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 99), 1 - rate, x.shape[1:]))
        return x * keep(keys_B).astype(x.dtype) / (1 - rate)

    return apply_task_head(params["task"], x, head.kind, model.config.model.norm_eps, dropout)


def run_head(
    model: LoadedModel, head: TaskHead, rows: Sequence[list[int]], on_batch: OnBatch = lambda: None
) -> list[np.ndarray]:
    """Computes the outputs of a loaded head for rows of tokens, see `embeddings.run_batches`."""
    params = {"encoder": model.params["encoder"], "task": head.params}
    encoder = jax.jit(lambda params, tokens_BL: head_outputs(model, head, params, tokens_BL))
    return embeddings.run_batches(model, encoder, params, rows, on_batch)
