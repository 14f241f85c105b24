"""Contrastive fine-tuning: texts that belong together get vectors that point the same way.

InfoNCE (arXiv:1807.03748): a query must tell its own positive from all others of the batch, on all devices, and from
hard negatives (arXiv:2004.04906). Where a text comes alone it is its own positive, and only dropout tells the two apart
(SimCSE, arXiv:2104.08821); how well that goes is told by the loss itself. Matryoshka (arXiv:2205.13147): the first few
dimensions alone are trained to do as well.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mlm.distributed.batches import merge_rows, shard_rows, unmerge_rows
from flax_mlm.distributed.mesh import replicate, reshard_like
from flax_mlm.errors import UserError
from flax_mlm.finetuning import loop as finetune
from flax_mlm.finetuning.loop import Params, Poll
from flax_mlm.inference.load import LoadedModel

_NONE = -1  # in place of a hard negative where an example has none


class Pairs(NamedTuple):
    """N queries, a text that belongs to each, and some that do not."""

    queries: list[str]
    positives: list[str]
    negatives: list[list[str]]  # hard ones of each query; may be empty

    def take(self, numbers: Iterable[int]) -> "Pairs":
        """Some of them."""
        some = [(self.queries[i], self.positives[i], self.negatives[i]) for i in numbers]
        return Pairs(*map(list, zip(*some, strict=True)))

    @property
    def are_alone(self) -> bool:
        """Whether all are texts that come alone."""
        return self.queries == self.positives


def make_fit(
    trained: LoadedModel, train: Pairs, dev: Pairs, vectors: finetune.Vectors, poll: Poll
) -> Callable[[float, int], finetune.Fitted]:
    """(learning rate, seed) -> the fine-tuned encoder of the epoch whose vectors rank the positives of `dev` best (mean
    reciprocal rank among all of its positives and negatives); or, where these are the queries themselves and so always
    first, whose loss is the lowest. `vectors` is `finetune.make_vectors`.

    Raises:
      UserError: there is nothing to tell texts from themselves.
    """
    config, model = trained.config.finetune, trained.config.model
    if train.are_alone and not model.dropout_rate and not model.attention_dropout_rate:
        raise UserError(
            "--train holds texts alone, which only dropout tells from themselves, and model.dropout_rate is 0; set "
            "--config.model.dropout_rate=0.1"
        )
    loss = make_loss(trained)
    trainer = finetune.make_trainer(trained, loss, lambda key: {})
    steps = finetune.batches_of(len(train.queries), config.batch_size)

    def rank_score(params: Params) -> float:
        return float((1 / ranks(lambda some: vectors_of(trained, vectors, params, some, poll), dev)).mean())

    epoch = _make_epoch(trained, train)
    score = _make_loss_score(trained, loss, dev, poll) if dev.are_alone else rank_score
    return lambda rate, seed: finetune.fit(trained, trainer, epoch, steps, score, rate, seed, poll)


def _make_loss_score(
    trained: LoadedModel, loss: Callable[..., jax.Array], dev: Pairs, poll: Poll
) -> Callable[[Params], float]:
    """Minus the mean loss over a set, with dropout that is the same every time."""
    just_loss, held_out = jax.jit(loss), _make_epoch(trained, dev)

    def score(params: Params) -> float:
        losses = []
        for i, batch in enumerate(held_out(np.random.default_rng(0))):
            poll()
            arrays = shard_rows(list(batch), trained.mesh)
            losses.append(float(just_loss(params, *arrays, jax.random.fold_in(jax.random.key(0), i))))
        return -float(np.mean(losses))

    return score


def _make_epoch(trained: LoadedModel, pairs: Pairs) -> Callable[[np.random.Generator], Iterator[finetune.Batch]]:
    """The batches of one epoch, as `make_loss` takes them."""
    config = trained.config.finetune
    unique = {text: i for i, text in enumerate(dict.fromkeys(_texts(pairs)))}
    texts = finetune.tokenised(trained, list(unique))
    lengths = [len(texts.tokens[unique[query]]) for query in pairs.queries]

    def epoch(rng: np.random.Generator) -> Iterator[finetune.Batch]:
        for numbers in finetune.epoch_batches(lengths, config.batch_size, rng):
            ids_BG = np.full((len(numbers), 2 + config.hard_negatives), _NONE, np.int32)
            for b, i in enumerate(numbers):
                hard = rng.permutation(pairs.negatives[i])[: config.hard_negatives]
                chosen = [unique[str(text)] for text in (pairs.queries[i], pairs.positives[i], *hard)]
                ids_BG[b, : len(chosen)] = chosen
            tokens_RL, types_RL = finetune.padded(trained, texts.take(np.maximum(ids_BG, 0).ravel().tolist()))
            shape = *ids_BG.shape, tokens_RL.shape[1]
            yield tokens_RL.reshape(shape), types_RL.reshape(shape), ids_BG

    return epoch


def make_loss(trained: LoadedModel) -> Callable[..., jax.Array]:
    """(parameters, tokens and token types int32 (B, G, L), text numbers int32 (B, G), key) -> scalar.

    Each group is a query, its positive and its hard negatives (number -1: none). Texts equal to the query or to its
    positive are not wrong answers, wherever in the batch they are; nor are other positives of the same query.
    """
    config = trained.config.finetune
    sizes = config.sizes(trained.config.model.hidden_size)

    def loss(params: Params, tokens_BGL: jax.Array, types_BGL: jax.Array, ids_BG: jax.Array, key: jax.Array) -> Any:
        groups, size = ids_BG.shape
        tokens_RL, types_RL = merge_rows((tokens_BGL, types_BGL))
        keys_R = finetune.row_keys(key, tokens_RL[:, 0])
        states_RLD = finetune.encode(trained, params, tokens_RL, types_RL, keys_R)
        vectors_BGD = unmerge_rows(finetune.pooled(trained, states_RLD, tokens_RL), size)
        queries_BD = vectors_BGD[:, 0]
        candidates_CD = replicate(vectors_BGD[:, 1:]).reshape(groups * (size - 1), -1)
        ids_C = replicate(ids_BG[:, 1:]).reshape(-1)
        place_C = jnp.arange(len(ids_C), dtype=jnp.int32)
        own_B = reshard_like(jnp.arange(groups, dtype=jnp.int32) * (size - 1), ids_BG[:, 0])
        is_own_BC = place_C == own_B[:, None]
        same_BC = (ids_C == ids_BG[:, :1]) | (ids_C == ids_BG[:, 1:2]) | (ids_C == _NONE)
        query_C = jnp.repeat(replicate(ids_BG[:, 0]), size - 1)
        same_BC |= (place_C % (size - 1) == 0) & (query_C == ids_BG[:, :1])
        total = jnp.float32(0.0)
        for width in sizes:
            scores_BC = normal(queries_BD[:, :width]) @ normal(candidates_CD[:, :width]).T / config.temperature
            scores_BC = jnp.where(same_BC & ~is_own_BC, -jnp.inf, scores_BC)
            own_score_B = jnp.where(is_own_BC, scores_BC, 0.0).sum(-1)
            total += (jax.nn.logsumexp(scores_BC, axis=-1) - own_score_B).mean()
        return total / len(sizes)

    return loss


def normal(x_ND: Any) -> Any:
    """Rows of length 1 (a row of zeros stays one)."""
    square_N1 = (x_ND * x_ND).sum(-1, keepdims=True)
    xp: Any = jnp if isinstance(x_ND, jax.Array) else np
    return x_ND / xp.sqrt(xp.maximum(square_N1, 1e-12))


def vectors_of(trained: LoadedModel, vectors: finetune.Vectors, params: Params, texts: list[str], poll: Poll) -> Any:
    """Vectors of length 1, float32 (N, D), of texts."""
    return normal(np.stack(finetune.predict(trained, vectors, params, finetune.tokenised(trained, texts), poll)))


def ranks(embed: Callable[[list[str]], np.ndarray], pairs: Pairs) -> np.ndarray:
    """From 1: where each query's positive stands among all positives and negatives of the set, int64 (N,); last of
    those that are as near, so that vectors which are all the same, or no numbers, are no good."""
    candidates = {text: i for i, text in enumerate(dict.fromkeys(chain(pairs.positives, *pairs.negatives)))}
    scores_NC = embed(pairs.queries) @ embed(list(candidates)).T
    own_N1 = np.take_along_axis(scores_NC, np.array([[candidates[text]] for text in pairs.positives]), axis=1)
    return (~(scores_NC < own_N1)).sum(1)


def _texts(pairs: Pairs) -> Iterator[str]:
    for query, positive, negatives in zip(*pairs, strict=True):
        yield from (query, positive, *negatives)
