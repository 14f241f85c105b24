"""Task heads: dropout and a linear map of the pooled states (B, D) or of each state (B, L, D) (arXiv:1810.04805 §4)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mlm.inference.embeddings import Encoder, Params, dropout_keys, hidden_states, pool
from flax_mlm.inference.model import LoadedModel
from flax_mlm.model.heads import apply_task_head, init_task_head


class Head(NamedTuple):
    """The functions of a task head on top of an encoder."""

    init: Callable[[jax.Array], dict[str, Any]]  # key -> parameters of the head
    loss: Callable[..., jax.Array]  # params, tokens, token types, labels, key -> scalar
    outputs: Encoder  # jitted, without dropout: params, tokens, token types -> (B, C) or (B, L, C)


def make_head(model: LoadedModel, num_outputs: int, per_token: bool = False, regression: bool = False) -> Head:
    """Builds a task's head and its loss.

    Args:
      num_outputs: C.
      per_token: labels are int32 (B, L), -1 where a token has none; else (B,).
      regression: squared error of the one output, for float32 labels; else cross-entropy.
    """
    dropout_rate = model.config.finetune.dropout_rate

    def init(key: jax.Array) -> dict[str, Any]:
        return {"task": init_task_head(key, model.config.model, num_outputs)}

    def outputs(params: Params, tokens_BL: jax.Array, types_BL: jax.Array, keys_B: Any = None) -> jax.Array:
        x = hidden_states(model, params, tokens_BL, types_BL, keys_B)
        if not per_token:
            x = pool(model, x, tokens_BL)
        if keys_B is not None and dropout_rate:
            keep = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 99), 1 - dropout_rate, x.shape[1:]))
            x = x * keep(keys_B) / (1 - dropout_rate)
        return apply_task_head(params["task"], x)

    def loss(params: Params, tokens_BL: jax.Array, types_BL: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        logits = outputs(params, tokens_BL, types_BL, dropout_keys(key, tokens_BL[:, 0]))
        if regression:
            return jnp.square(logits[..., 0] - labels).mean()
        one_hot = jax.nn.one_hot(labels, num_outputs)  # all zeros for label -1
        return -(one_hot * jax.nn.log_softmax(logits)).sum() / jnp.maximum(one_hot.sum(), 1.0)

    return Head(init, loss, jax.jit(outputs))
