"""Task heads: dropout and a linear map of the pooled states (B, D) or of each state (B, L, D) (arXiv:1810.04805 §4)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mlm.finetuning.loop import Batch, Problem, SearchResult, search
from flax_mlm.inference import embeddings
from flax_mlm.inference.load import LoadedModel, Log, OnBatch, Params, pad_rows
from flax_mlm.model.heads import apply_task_head, init_task_head

NO_LABEL = -1


def fine_tune_head(
    model: LoadedModel,
    rows: Mapping[str, list[list[int]]],
    labels: Any,
    num_outputs: int,
    predict: Callable[[str, list[np.ndarray]], Any],
    score: Callable[[str, Any], float],
    log: Log,
    on_batch: OnBatch,
) -> SearchResult:
    """Fine-tunes an encoder with a head of C outputs; the outcome of a seed is the predictions for the test set.

    Args:
      rows: tokens of the texts of the parts train, dev and test.
      labels: of the training texts, int32 (N,) for cross-entropy, or float32 (N,) for the squared error of the one
        output; or for each text a list of the labels of its tokens, `NO_LABEL` where a token has none.
      num_outputs: C.
      predict: part, outputs, float32 (C,) or (L, C) a text -> predictions.
      score: part, predictions -> metric, higher is better.

    Raises:
      UserError: see `search`.
    """
    rate, per_token = model.config.finetune.dropout_rate, not isinstance(labels, np.ndarray)

    def init(key: jax.Array) -> dict[str, Any]:
        return {"task": init_task_head(key, model.config.model, num_outputs)}

    def head(params: Params, tokens_BL: jax.Array, keys_B: Any = None) -> jax.Array:
        x = embeddings.hidden_states(model, params, tokens_BL, keys_B)
        if not per_token:
            x = embeddings.pool(model, x, tokens_BL)
        if keys_B is not None and rate:
            keep = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 99), 1 - rate, x.shape[1:]))
            x = x * keep(keys_B) / (1 - rate)
        return apply_task_head(params["task"], x)

    def loss(params: Params, tokens_BL: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        logits = head(params, tokens_BL, embeddings.dropout_keys(key, tokens_BL[:, 0]))
        if jnp.issubdtype(labels.dtype, jnp.floating):
            return jnp.square(logits[..., 0] - labels).mean()
        one_hot = jax.nn.one_hot(labels, num_outputs)  # all zeros for NO_LABEL
        return -(one_hot * jax.nn.log_softmax(logits)).sum() / jnp.maximum(one_hot.sum(), 1.0)

    def batch(indices: list[int], _: np.random.Generator) -> Batch:
        tokens_BL = embeddings.pad(model, [rows["train"][i] for i in indices])
        if not per_token:
            return tokens_BL, labels[indices]
        return tokens_BL, pad_rows([labels[i] for i in indices], tokens_BL.shape, NO_LABEL)

    encoder = jax.jit(head)

    def predictions(params: Params, part: str) -> Any:
        return predict(part, embeddings.run_batches(model, encoder, params, rows[part], on_batch))

    def dev_score(params: Params) -> float:
        return score("dev", predictions(params, "dev"))

    problem = Problem(init, loss, [len(row) for row in rows["train"]], batch, dev_score)
    return search(model, problem, lambda params: predictions(params, "test"), log, on_batch)
