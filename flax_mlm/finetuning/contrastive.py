"""Contrastive fine-tuning with InfoNCE (arXiv:1807.03748).

Each query must pick its own positive among the positives of the whole batch, on all devices, and hard negatives
(arXiv:2004.04906). A text without a partner is its own positive, and only dropout makes their vectors differ (SimCSE,
arXiv:2104.08821); the development loss then chooses the epoch. With Matryoshka (arXiv:2205.13147) the first few
dimensions alone are trained on the same loss.
"""

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mlm.distributed import batches, mesh
from flax_mlm.errors import UserError
from flax_mlm.finetuning.loop import Batch, Problem, epoch_indices
from flax_mlm.inference import embeddings
from flax_mlm.inference.forward import check_finite
from flax_mlm.inference.load import LoadedModel, OnBatch, Params, pad_rows
from flax_mlm.objectives.rows import new_key

_NONE = -1  # text index where an example has fewer hard negatives than others


class Pairs(NamedTuple):
    """N queries, each with its positive text and any number of hard negatives."""

    queries: list[str]
    positives: list[str]
    negatives: list[list[str]]

    @property
    def are_single_texts(self) -> bool:
        """True where every text is its own positive."""
        return self.queries == self.positives


def make_problem(
    model: LoadedModel, train: Pairs, dev: Pairs, encoder: embeddings.Encoder, on_batch: OnBatch
) -> Problem:
    """Builds the fine-tuning problem of a set of pairs.

    The score on the development set is the mean reciprocal rank of the positives among all its positives and negatives;
    for single texts, whose own vector is always first, it is minus the loss.

    Args:
      encoder: `embeddings.make_encoder(model)`.

    Raises:
      UserError: single texts, and a model without dropout.
    """
    rates = model.config.model.dropout_rate, model.config.model.attention_dropout_rate
    if train.are_single_texts and not any(rates):
        what = "--train has single texts, which need dropout as the only difference between query and positive"
        raise UserError(f"{what}, but model.dropout_rate is 0; set --config.model.dropout_rate=0.1")
    loss = make_loss(model)
    jitted_loss = jax.jit(loss)
    dev_lengths, dev_batch = _make_batches(model, dev)

    def minus_loss(params: Params) -> float:  # with the same batches and dropout in every call
        losses, rng = [], np.random.default_rng(0)
        for i, indices in enumerate(epoch_indices(dev_lengths, model.config.finetune.batch_size, rng)):
            on_batch()
            arrays = batches.shard_rows(list(dev_batch(indices, rng)), model.mesh)
            losses.append(float(jitted_loss(params, *arrays, jax.random.fold_in(new_key(0), i))))
        check_finite(losses)
        return -float(np.mean(losses))

    def reciprocal_rank(params: Params) -> float:
        return float((1 / ranks(lambda texts: embeddings.embed(model, texts, encoder, params, on_batch), dev)).mean())

    dev_score = minus_loss if dev.are_single_texts else reciprocal_rank
    return Problem(lambda key: {}, loss, *_make_batches(model, train), dev_score)


def _make_batches(model: LoadedModel, pairs: Pairs) -> tuple[list[int], Callable[..., Batch]]:
    """Returns the queries' lengths, and the function (indices, generator) -> batch in the form of `make_loss`."""
    num_negatives = model.config.finetune.hard_negatives
    index_of = {text: i for i, text in enumerate(dict.fromkeys(chain(*pairs[:2], *pairs.negatives)))}
    rows = embeddings.tokenize_for_vectors(model, list(index_of))

    def batch(indices: list[int], rng: np.random.Generator) -> Batch:
        groups = []
        for i in indices:
            hard = rng.permutation(pairs.negatives[i])[:num_negatives]
            groups.append([index_of[str(text)] for text in (pairs.queries[i], pairs.positives[i], *hard)])
        ids_BG = pad_rows(groups, (len(groups), 2 + num_negatives), _NONE)
        tokens_RL = embeddings.pad(model, [rows[i] for i in np.maximum(ids_BG, 0).ravel()])
        return tokens_RL.reshape(*ids_BG.shape, -1), ids_BG

    return [len(rows[index_of[query]]) for query in pairs.queries], batch


def make_loss(model: LoadedModel) -> Callable[..., jax.Array]:
    """Builds the loss (params, tokens (B, G, L), text indices (B, G), key) -> scalar.

    A group of G texts is a query, its positive and its hard negatives (index -1: none). Texts equal to the query or to
    its positive do not count as negatives, wherever they are in the batch, nor do other positives of the same query.
    """
    config = model.config.finetune
    dims = config.sizes(model.config.model.hidden_size)

    def loss(params: Params, tokens_BGL: jax.Array, ids_BG: jax.Array, key: jax.Array) -> jax.Array:
        batch_size, group_size = ids_BG.shape
        tokens_RL = batches.merge_rows(tokens_BGL)
        states_RLD = embeddings.hidden_states(model, params, tokens_RL, embeddings.dropout_keys(key, tokens_RL[:, 0]))
        vectors_BGD = batches.unmerge_rows(embeddings.pool(model, states_RLD, tokens_RL), group_size)
        queries_BD = vectors_BGD[:, 0]
        candidates_CD = mesh.replicate(vectors_BGD[:, 1:]).reshape(batch_size * (group_size - 1), -1)
        ids_1C = mesh.replicate(ids_BG[:, 1:]).reshape(1, -1)
        index_1C = jnp.arange(ids_1C.size, dtype=jnp.int32)[None]
        positive_B = mesh.reshard_like(jnp.arange(batch_size, dtype=jnp.int32) * (group_size - 1), ids_BG[:, 0])
        is_positive_BC = index_1C == positive_B[:, None]
        is_ignored_BC = (ids_1C == ids_BG[:, :1]) | (ids_1C == ids_BG[:, 1:2]) | (ids_1C == _NONE)
        query_1C = jnp.repeat(mesh.replicate(ids_BG[:, 0]), group_size - 1)[None]
        is_ignored_BC |= (index_1C % (group_size - 1) == 0) & (query_1C == ids_BG[:, :1])
        total = jnp.float32(0.0)
        for dim in dims:
            cosine_BC = embeddings.normalize(queries_BD[:, :dim]) @ embeddings.normalize(candidates_CD[:, :dim]).T
            logits_BC = jnp.where(is_ignored_BC & ~is_positive_BC, -jnp.inf, cosine_BC / config.temperature)
            positive_logit_B = jnp.where(is_positive_BC, logits_BC, 0.0).sum(-1)
            total += (jax.nn.logsumexp(logits_BC, axis=-1) - positive_logit_B).mean()
        return total / len(dims)

    return loss


def ranks(embed: Callable[[list[str]], np.ndarray], pairs: Pairs) -> np.ndarray:
    """Ranks each query's positive among all positives and negatives of the set, int64 (N,), from 1.

    Ties count against the positive, so that equal or NaN vectors get the worst rank.
    """
    candidates = {text: i for i, text in enumerate(dict.fromkeys(chain(pairs.positives, *pairs.negatives)))}
    similarity_NC = embed(pairs.queries) @ embed(list(candidates)).T
    positive_N1 = np.array([[candidates[text]] for text in pairs.positives])
    return (~(similarity_NC < np.take_along_axis(similarity_NC, positive_N1, axis=1))).sum(1)
