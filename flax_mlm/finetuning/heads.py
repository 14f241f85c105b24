"""Fine-tuning with a task's head on the pooled states (B, D), or on each state (B, L, D) (arXiv:1810.04805 §4)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mlm.distributed import mesh
from flax_mlm.errors import UserError
from flax_mlm.finetuning.loop import Batch, Problem, SearchResult, search
from flax_mlm.hf import task_heads
from flax_mlm.hf.folder import matching_architecture, open_folder
from flax_mlm.inference import embeddings
from flax_mlm.inference.classify import head_outputs
from flax_mlm.inference.load import LoadedModel, Log, OnBatch, Params, pad_rows
from flax_mlm.inference.task_head import TaskHead
from flax_mlm.model.heads import init_task_head

NO_LABEL = -1


def choose_kind(model: LoadedModel, task: str) -> str:
    """Returns the kind of head of `finetune.head`, for classification or tagging.

    `auto` is that of the class of transformers that the encoder can be exported as; `linear` where there is none, or
    none with `finetune.pooling`.
    """
    config, t = model.config, model.tokenizer
    if config.finetune.head == "linear":
        return "linear"
    try:
        if config.init_from and not model.meta:
            architecture = open_folder(config.init_from).architecture
        else:
            architecture = matching_architecture(config.model, config.objective.name, "", t.tokens[t.cls_id])
    except UserError:
        return "linear"
    return task_heads.head_kind(architecture, task, config.finetune.pooling) or "linear"


def fine_tune_head(
    model: LoadedModel,
    head: TaskHead,
    rows: Mapping[str, list[list[int]]],
    labels: Any,
    predict: Callable[[str, list[np.ndarray]], Any],
    score: Callable[[str, Any], float],
    log: Log,
    on_batch: OnBatch,
    class_weights_C: np.ndarray | None = None,
) -> SearchResult:
    """Fine-tunes an encoder with a head of C outputs; the outcome of a seed is the predictions for the test set.

    Args:
      head: the head to train, without parameters.
      rows: tokens of the texts of the parts train, dev and test.
      labels: of the training texts: int32 (N,) for cross-entropy; float32 (N, C), 0 or 1, for a cross-entropy of each
        label; float32 (N,) for the squared error of a regression; or for each text a list of the labels of its tokens,
        `NO_LABEL` where a token has none.
      predict: part, outputs, float32 (C,) or (L, C) a text -> predictions.
      score: part, predictions -> metric, higher is better.
      class_weights_C: factor of each class in the loss, with several labels a text of its positive examples.

    Raises:
      UserError: see `search`.
    """
    loss_of = make_loss(head, class_weights_C)

    def init(key: jax.Array) -> dict[str, Any]:
        return {"task": _start(model, head, init_task_head(key, model.config.model, head.num_outputs, head.kind))}

    def loss(params: Params, tokens_BL: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        keys_B = embeddings.dropout_keys(key, tokens_BL[:, 0])
        return loss_of(head_outputs(model, head, params, tokens_BL, keys_B), labels)

    def batch(indices: list[int], _: np.random.Generator) -> Batch:
        tokens_BL = embeddings.pad(model, [rows["train"][i] for i in indices])
        if not head.per_token:
            return tokens_BL, labels[indices]
        return tokens_BL, pad_rows([labels[i] for i in indices], tokens_BL.shape, NO_LABEL)

    encoder = jax.jit(lambda params, tokens_BL: head_outputs(model, head, params, tokens_BL))

    def predictions(params: Params, part: str) -> Any:
        return predict(part, embeddings.run_batches(model, encoder, params, rows[part], on_batch))

    def dev_score(params: Params) -> float:
        return score("dev", predictions(params, "dev"))

    problem = Problem(init, loss, [len(row) for row in rows["train"]], batch, dev_score)
    return search(model, problem, lambda params: predictions(params, "test"), log, on_batch)


def make_loss(head: TaskHead, class_weights_C: np.ndarray | None = None) -> Callable[..., jax.Array]:
    """Builds the loss (outputs (..., C), labels) -> scalar, see `fine_tune_head`; PyTorch's are the same."""
    weights_C = np.ones(head.num_outputs, np.float32) if class_weights_C is None else class_weights_C

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        if head.problem == "regression":
            return jnp.square(logits[..., 0] - labels).mean()
        if head.problem == "multi_label_classification":
            positive, negative = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
            return -(labels * positive * weights_C[None] + (1 - labels) * negative).mean()
        one_hot = jax.nn.one_hot(labels, head.num_outputs)  # all zeros for NO_LABEL
        if class_weights_C is not None:
            one_hot *= weights_C[(None,) * labels.ndim]
        total = one_hot.sum()
        return -(one_hot * jax.nn.log_softmax(logits)).sum() / jnp.where(total > 0, total, 1.0)

    return loss


def _start(model: LoadedModel, head: TaskHead, fresh: dict[str, Any]) -> dict[str, Any]:
    """Starts the layer before the outputs from pretrained weights where the model has some, as transformers does."""
    started = dict(fresh)
    if head.kind == "prediction" and not model.missing_head:
        started |= mesh.replicate({name: model.params["head"][name] for name in ("dense", "norm")})
    elif head.kind != "linear" and model.pooler and not head.per_token:
        started |= model.pooler
    return started
