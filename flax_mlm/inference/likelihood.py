"""Log-likelihoods of texts: exact for causal models, pseudo-log-likelihoods for masked ones.

Pseudo-log-likelihood (Salazar et al. 2020, arXiv:1910.14659): each token is masked in turn, and the log-probabilities
of the masked tokens are added up. The other tokens of a word give a masked token of it away, so that the variant
`within_word_l2r` (Kauf & Ivanova 2023, arXiv:2305.10588) also masks those to its right.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flax_mlm.errors import UserError
from flax_mlm.inference.load import LoadedModel, OnBatch, pad_rows

_BATCH_TOKENS = 8192


class _Query(NamedTuple):
    """A row of tokens, and labels whose log-probabilities are wanted."""

    text: int  # index of the text
    tokens: list[int]
    positions: list[int]  # hidden states to predict from
    labels: list[int]


def log_likelihood(
    model: LoadedModel, texts: Sequence[str], variant: str = "within_word_l2r", on_batch: OnBatch = lambda: None
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
        starts = t.word_starts(np.array(tokens))
        if model.config.objective.name == "clm":
            queries.append(_Query(index, tokens, list(range(len(ids))), tokens[1:-1]))
            continue
        for i in range(1, len(tokens) - 1):
            end = i + 1
            while variant == "within_word_l2r" and end < len(tokens) - 1 and not starts[end]:
                end += 1
            masked = tokens[:i] + [t.mask_id] * (end - i) + tokens[end:]
            queries.append(_Query(index, masked, [i], [tokens[i]]))
    totals_N = np.zeros(len(texts))
    np.add.at(totals_N, [query.text for query in queries], _log_probabilities(model, queries, on_batch))
    return totals_N


def _log_probabilities(model: LoadedModel, queries: Sequence[_Query], on_batch: OnBatch) -> np.ndarray:
    """Computes the sum of each query's log-probabilities, float64 (len(queries),)."""
    totals = np.zeros(len(queries))
    indices_of: dict[tuple[int, int], list[int]] = {}  # (L, K) -> indices of queries
    for i, query in enumerate(queries):
        length = model.padded_length(len(query.tokens))
        indices_of.setdefault((length, 1 if len(query.positions) == 1 else length), []).append(i)
    for (length, num_predictions), indices in sorted(indices_of.items()):
        size = max(_BATCH_TOKENS // length, 1)
        for batch in (indices[begin : begin + size] for begin in range(0, len(indices), size)):
            on_batch()
            rows, labels = [queries[i].tokens for i in batch], [queries[i].labels for i in batch]
            positions = [queries[i].positions for i in batch]
            log_probs_BK = model.log_probs(rows, positions, labels, (size, length, num_predictions))
            weights_BK = pad_rows([[1] * len(row) for row in labels], log_probs_BK.shape)
            totals[batch] = (log_probs_BK.astype(np.float64) * weights_BK).sum(1)
    return totals
