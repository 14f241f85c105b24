"""Log-likelihoods of texts: exact for causal models, pseudo-log-likelihoods for masked ones.

Pseudo-log-likelihood (Salazar et al. 2020, arXiv:1910.14659): each token is masked in turn, and the log-probabilities
of the masked tokens are added up. The other tokens of a word give a masked token of it away, so that the variant
`within_word_l2r` (Kauf & Ivanova 2023, arXiv:2305.10588) also masks those to its right.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_mlm.distributed.batches import shard_replicated_rows
from flax_mlm.distributed.mesh import num_batch_shards
from flax_mlm.errors import UserError
from flax_mlm.inference.model import LoadedModel

_BATCH_TOKENS = 8192


class _Query(NamedTuple):
    """A row of tokens, and labels whose log-probabilities are wanted."""

    text: int  # index of the text
    tokens: list[int]
    positions: list[int]  # hidden states to predict from
    labels: list[int]


def log_likelihood(
    model: LoadedModel,
    texts: Sequence[str],
    variant: str = "within_word_l2r",
    on_batch: Callable[[], Any] = lambda: None,
) -> np.ndarray:
    """Computes log-likelihoods of N texts in nats, without special tokens, float64 (N,).

    Args:
      variant: of the pseudo-log-likelihood, `original` or `within_word_l2r`; ignored by a causal model.
      on_batch: called before every batch.

    Raises:
      UserError: a text is empty, or longer than the rows that the model was trained on.
    """
    t, limit = model.tokenizer, model.max_length - 2
    queries: list[_Query] = []
    for index, (text, ids) in enumerate(zip(texts, t.encode(texts), strict=True)):
        if not 0 < len(ids) <= limit:
            raise UserError(f"text {index + 1}, '{text[:60]}', has {len(ids)} tokens; expected 1 to {limit}")
        tokens = [t.cls_id, *ids.tolist(), t.sep_id]
        if model.config.objective.name == "clm":
            queries.append(_Query(index, tokens, list(range(len(ids))), tokens[1:-1]))
        else:
            queries += _mask_in_turn(index, tokens, t.starts_word[tokens], t.mask_id, variant)
    totals_N = np.zeros(len(texts))
    np.add.at(totals_N, [query.text for query in queries], _log_probabilities(model, queries, on_batch))
    return totals_N


def _mask_in_turn(
    text: int, tokens: list[int], starts_word: np.ndarray, mask_id: int, variant: str
) -> Iterator[_Query]:
    for i in range(1, len(tokens) - 1):
        end = i + 1
        while variant == "within_word_l2r" and end < len(tokens) - 1 and not starts_word[end]:
            end += 1
        yield _Query(text, tokens[:i] + [mask_id] * (end - i) + tokens[end:], [i], [tokens[i]])


def _log_probabilities(model: LoadedModel, queries: Sequence[_Query], on_batch: Callable[[], Any]) -> np.ndarray:
    """Computes the sum of each query's log-probabilities, float64 (len(queries),)."""
    totals, shards = np.zeros(len(queries)), num_batch_shards(model.mesh)
    indices_of: dict[tuple[int, int], list[int]] = {}  # (L, K) -> indices of queries
    for i, query in enumerate(queries):
        length = model.padded_length(len(query.tokens))
        indices_of.setdefault((length, 1 if len(query.positions) == 1 else length), []).append(i)
    for (length, num_predictions), indices in sorted(indices_of.items()):
        size = -(-max(_BATCH_TOKENS // length, 1) // shards) * shards
        for batch in (indices[begin : begin + size] for begin in range(0, len(indices), size)):
            on_batch()
            tokens_BL = np.full((size, length), model.tokenizer.pad_id, np.int32)
            predict_BK, labels_BK = np.zeros((2, size, num_predictions), np.int32)
            weights_BK = np.zeros((size, num_predictions))
            for b, i in enumerate(batch):
                query, count = queries[i], len(queries[i].positions)
                tokens_BL[b, : len(query.tokens)] = query.tokens
                predict_BK[b, :count] = query.positions
                labels_BK[b, :count] = query.labels
                weights_BK[b, :count] = 1.0
            with jax.set_mesh(model.mesh):
                rows = shard_replicated_rows([tokens_BL, predict_BK, labels_BK], model.mesh)
                tokens, predict, labels = rows
                log_probs_BK = model.forward.label_log_probs(model.params, tokens, predict, labels, model.vocab)
            totals[batch] = (np.asarray(log_probs_BK, np.float64) * weights_BK).sum(1)[: len(batch)]
    return totals
