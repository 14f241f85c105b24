"""How likely a model finds texts: the log-likelihood of a causal model, the pseudo-log-likelihood of a masked one.

Pseudo-log-likelihood (Salazar et al. 2020, arXiv:1910.14659): each token is hidden in turn, and the log-probabilities
of what was there are added. Where a word has several pieces, those that are left give the hidden one away; hiding the
pieces to its right too (Kauf & Ivanova 2023, arXiv:2305.10588) is the variant `within_word_l2r`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_mlm.distributed.batches import shard_replicated_rows
from flax_mlm.distributed.mesh import num_batch_shards
from flax_mlm.errors import UserError
from flax_mlm.inference.load import LoadedModel

_TOKENS = 8192  # at a time


class Row(NamedTuple):
    """One question to the model: how likely are these labels at these places?"""

    text: int  # number of the text that it is about
    tokens: list[int]
    places: list[int]
    labels: list[int]


def of_texts(
    trained: LoadedModel,
    texts: Sequence[str],
    variant: str = "within_word_l2r",
    poll: Callable[[], Any] = lambda: None,
) -> np.ndarray:
    """Log-likelihoods of N texts in nats, special tokens not counted: float64 (N,).

    Args:
      variant: of the pseudo-log-likelihood, `original` or `within_word_l2r`; a causal model has one only.
      poll: called before every batch.

    Raises:
      UserError: a text is empty, or longer than what the model was trained on.
    """
    t, limit = trained.tokenizer, trained.max_length
    rows: list[Row] = []
    for number, (text, ids) in enumerate(zip(texts, t.encode(texts), strict=True)):
        if not 0 < len(ids) <= limit - 2:
            raise UserError(f"text {number + 1}, '{text[:60]}', has {len(ids)} tokens; it can have 1 to {limit - 2}")
        tokens = [t.cls_id, *ids.tolist(), t.sep_id]
        if trained.config.objective.name == "clm":
            rows.append(Row(number, tokens, list(range(len(ids))), tokens[1:-1]))
        else:
            rows += _hidden_in_turn(number, tokens, t.starts_word[tokens], t.mask_id, variant)
    totals_N = np.zeros(len(texts))
    np.add.at(totals_N, [row.text for row in rows], scores(trained, rows, poll))
    return totals_N


def _hidden_in_turn(number: int, tokens: list[int], starts: np.ndarray, mask: int, variant: str) -> Iterator[Row]:
    for i in range(1, len(tokens) - 1):
        end = i + 1
        while variant == "within_word_l2r" and end < len(tokens) - 1 and not starts[end]:
            end += 1
        yield Row(number, tokens[:i] + [mask] * (end - i) + tokens[end:], [i], [tokens[i]])


def scores(trained: LoadedModel, rows: Sequence[Row], poll: Callable[[], Any]) -> np.ndarray:
    """The sum of each row's log-probabilities, float64 (len(rows),). `poll` is called before every batch."""
    result, parts = np.zeros(len(rows)), num_batch_shards(trained.mesh)
    kinds: dict[tuple[int, int], list[int]] = {}  # rows by padded length and number of slots
    for i, row in enumerate(rows):
        length = trained.padded_length(len(row.tokens))
        kinds.setdefault((length, 1 if len(row.places) == 1 else length), []).append(i)
    for (length, slots), numbers in sorted(kinds.items()):
        size = -(-max(_TOKENS // length, 1) // parts) * parts
        for batch in (numbers[begin : begin + size] for begin in range(0, len(numbers), size)):
            poll()
            tokens_BL = np.full((size, length), trained.tokenizer.pad_id, np.int32)
            places_BK, labels_BK = np.zeros((2, size, slots), np.int32)
            used_BK = np.zeros((size, slots))
            for b, i in enumerate(batch):
                row, count = rows[i], len(rows[i].places)
                tokens_BL[b, : len(row.tokens)] = row.tokens
                places_BK[b, :count], labels_BK[b, :count], used_BK[b, :count] = row.places, row.labels, 1.0
            with jax.set_mesh(trained.mesh):
                tokens, places, labels = shard_replicated_rows([tokens_BL, places_BK, labels_BK], trained.mesh)
                found_BK = trained.steps.score_labels(trained.params, tokens, places, labels, trained.vocab)
            result[batch] = (np.asarray(found_BK, np.float64) * used_BK).sum(1)[: len(batch)]
    return result
