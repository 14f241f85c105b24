"""Contrastive fine-tuning with InfoNCE (arXiv:1807.03748).

Each query must pick its own positive among the positives of the whole batch, on all devices, and hard negatives
(arXiv:2004.04906). A text without a partner is its own positive, and only dropout makes their vectors differ (SimCSE,
arXiv:2104.08821); the development loss then chooses the epoch. With Matryoshka (arXiv:2205.13147) the first few
dimensions alone are trained on the same loss.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mlm.data.tables import take
from flax_mlm.distributed.batches import merge_rows, shard_rows, unmerge_rows
from flax_mlm.distributed.mesh import replicate, reshard_like
from flax_mlm.errors import UserError
from flax_mlm.finetuning.batches import Batch, epoch_indices, num_batches
from flax_mlm.finetuning.loop import Problem
from flax_mlm.inference import embeddings
from flax_mlm.inference.embeddings import Encoder, OnBatch, Params, normalize
from flax_mlm.inference.model import LoadedModel

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


def make_problem(model: LoadedModel, train: Pairs, dev: Pairs, encoder: Encoder, on_batch: OnBatch) -> Problem:
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
        raise UserError(
            "--train has single texts, which need dropout as the only difference between query and positive, but "
            "model.dropout_rate is 0; set --config.model.dropout_rate=0.1"
        )
    loss = make_loss(model)

    def reciprocal_rank(params: Params) -> float:
        return float((1 / ranks(lambda texts: embeddings.embed(model, texts, encoder, params, on_batch), dev)).mean())

    return Problem(
        init=lambda key: {},
        loss=loss,
        epoch=_make_epoch(model, train),
        steps_per_epoch=num_batches(len(train.queries), model.config.finetune.batch_size),
        dev_score=_make_loss_score(model, loss, dev, on_batch) if dev.are_single_texts else reciprocal_rank,
    )


def _make_loss_score(
    model: LoadedModel, loss: Callable[..., jax.Array], dev: Pairs, on_batch: OnBatch
) -> Callable[[Params], float]:
    """Builds a function that gives minus the mean loss on `dev`, with the same batches and dropout in every call."""
    jitted_loss, epoch = jax.jit(loss), _make_epoch(model, dev)

    def score(params: Params) -> float:
        losses = []
        for i, batch in enumerate(epoch(np.random.default_rng(0))):
            on_batch()
            arrays = shard_rows(list(batch), model.mesh)
            losses.append(float(jitted_loss(params, *arrays, jax.random.fold_in(jax.random.key(0), i))))
        return -float(np.mean(losses))

    return score


def _make_epoch(model: LoadedModel, pairs: Pairs) -> Callable[[np.random.Generator], Iterator[Batch]]:
    """Builds a function that yields an epoch's batches in the form of `make_loss`."""
    config = model.config.finetune
    index_of = {text: i for i, text in enumerate(dict.fromkeys(_texts(pairs)))}
    texts = embeddings.tokenize(model, list(index_of))
    lengths = [len(texts.tokens[index_of[query]]) for query in pairs.queries]

    def epoch(rng: np.random.Generator) -> Iterator[Batch]:
        for indices in epoch_indices(lengths, config.batch_size, rng):
            ids_BG = np.full((len(indices), 2 + config.hard_negatives), _NONE, np.int32)
            for b, i in enumerate(indices):
                hard = rng.permutation(pairs.negatives[i])[: config.hard_negatives]
                group = [index_of[str(text)] for text in (pairs.queries[i], pairs.positives[i], *hard)]
                ids_BG[b, : len(group)] = group
            tokens_RL, types_RL = embeddings.pad(model, take(texts, np.maximum(ids_BG, 0).ravel()))
            shape = *ids_BG.shape, tokens_RL.shape[1]
            yield tokens_RL.reshape(shape), types_RL.reshape(shape), ids_BG

    return epoch


def make_loss(model: LoadedModel) -> Callable[..., jax.Array]:
    """Builds the loss (params, tokens (B, G, L), token types (B, G, L), text indices (B, G), key) -> scalar.

    A group of G texts is a query, its positive and its hard negatives (index -1: none). Texts equal to the query or to
    its positive do not count as negatives, wherever they are in the batch, nor do other positives of the same query.
    """
    config = model.config.finetune
    dims = config.sizes(model.config.model.hidden_size)

    def loss(params: Params, tokens_BGL: jax.Array, types_BGL: jax.Array, ids_BG: jax.Array, key: jax.Array) -> Any:
        batch_size, group_size = ids_BG.shape
        tokens_RL, types_RL = merge_rows((tokens_BGL, types_BGL))
        keys_R = embeddings.dropout_keys(key, tokens_RL[:, 0])
        states_RLD = embeddings.hidden_states(model, params, tokens_RL, types_RL, keys_R)
        vectors_BGD = unmerge_rows(embeddings.pool(model, states_RLD, tokens_RL), group_size)
        queries_BD = vectors_BGD[:, 0]
        candidates_CD = replicate(vectors_BGD[:, 1:]).reshape(batch_size * (group_size - 1), -1)
        ids_C = replicate(ids_BG[:, 1:]).reshape(-1)
        index_C = jnp.arange(len(ids_C), dtype=jnp.int32)
        positive_B = reshard_like(jnp.arange(batch_size, dtype=jnp.int32) * (group_size - 1), ids_BG[:, 0])
        is_positive_BC = index_C == positive_B[:, None]
        is_ignored_BC = (ids_C == ids_BG[:, :1]) | (ids_C == ids_BG[:, 1:2]) | (ids_C == _NONE)
        query_C = jnp.repeat(replicate(ids_BG[:, 0]), group_size - 1)
        is_ignored_BC |= (index_C % (group_size - 1) == 0) & (query_C == ids_BG[:, :1])
        total = jnp.float32(0.0)
        for dim in dims:
            logits_BC = normalize(queries_BD[:, :dim]) @ normalize(candidates_CD[:, :dim]).T / config.temperature
            logits_BC = jnp.where(is_ignored_BC & ~is_positive_BC, -jnp.inf, logits_BC)
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


def _texts(pairs: Pairs) -> Iterator[str]:
    for query, positive, negatives in zip(*pairs, strict=True):
        yield from (query, positive, *negatives)
