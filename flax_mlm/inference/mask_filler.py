"""Filling masks: ranks the words that fit the [MASK]s of a text."""

import heapq
import math
from typing import Any

import numpy as np

from flax_mlm.errors import UserError
from flax_mlm.inference.load import LoadedModel


class MaskFiller:
    """Fills masks with a trained model; a causal model predicts from the text to the left of a mask."""

    def __init__(self, model: LoadedModel):
        self._model = model

    def encode(self, text: str) -> list[int]:
        """Token ids of `[CLS] text [SEP]`. Raises UserError: the text has no [MASK], or too many tokens."""
        t = self._model.tokenizer
        ids = [t.cls_id, *t.encode_with_mask(text), t.sep_id]
        if t.mask_id not in ids:
            own = t.tokens[t.mask_id]
            names = "[MASK]" if own == "[MASK]" else f"[MASK] or {own}"
            raise UserError(f"the text '{text}' has no {names}; put one where a word is wanted")
        self._check_length(ids, "the text")
        return ids

    def _check_length(self, ids: list[int], text: str) -> None:
        if len(ids) > (limit := self._model.row_length):
            raise UserError(f"{text} has {len(ids)} tokens; this model was trained on at most {limit}")

    def mask_positions(self, ids: list[int]) -> list[int]:
        """Positions of the masks."""
        return [i for i, token in enumerate(ids) if token == self._model.tokenizer.mask_id]

    def log_probabilities(self, rows: list[list[int]]) -> list[dict[int, np.ndarray]]:
        """Computes for each row the position of a mask -> float32 (V,), with -inf for special tokens."""
        m = self._model
        shift = int(m.config.objective.name == "clm")  # a causal model predicts the next position
        positions = [self.mask_positions(row) for row in rows]
        shape = len(rows), m.padded_length(max(map(len, rows))), max(map(len, positions))
        log_probs_BKV = m.log_probs(rows, [np.array(row) - shift for row in positions], None, shape)
        log_probs_BKV = log_probs_BKV[..., : m.tokenizer.vocab_size]
        log_probs_BKV[..., m.tokenizer.is_special] = -np.inf
        return [dict(zip(row, values, strict=False)) for row, values in zip(positions, log_probs_BKV, strict=False)]

    def word(self, token: int) -> str:
        """Text of a token; a token that continues a word begins with '…'."""
        t = self._model.tokenizer
        text = t.decode([token]).strip() or repr(t.tokens[token])
        return text if t.starts_word[token] else f"…{text}"

    def _top(self, text: str, k: int) -> tuple[list[int], dict[int, list[tuple[int, float]]]]:
        """Token ids of a text, and for each mask the k likeliest tokens with their probabilities."""
        ids = self.encode(text)
        (log_probs,) = self.log_probabilities([ids])
        k = min(k, int((~self._model.tokenizer.is_special).sum()))
        best = {i: np.argsort(-log_probs_V, kind="stable")[:k] for i, log_probs_V in log_probs.items()}
        return ids, {i: [(int(p), math.exp(log_probs[i][p])) for p in tokens] for i, tokens in best.items()}

    def top_words(self, text: str, k: int) -> list[list[tuple[str, float]]]:
        """Ranks the k likeliest words for each [MASK], with their probabilities, while the other masks stay masked."""
        _, top = self._top(text, k)
        return [[(self.word(token), probability) for token, probability in tokens] for tokens in top.values()]

    def fill_mask(self, text: str, k: int) -> list[Any]:
        """Ranks the k likeliest tokens as transformers' fill-mask pipeline does.

        Returns:
          dicts with score (probability), token (id), token_str and sequence (the filled text); with several [MASK]s a
          list of such lists, in whose sequences the other masks are kept.
        """
        t = self._model.tokenizer
        ids, top = self._top(text, k)
        parts = t.split_masks(text)

        def entry(index: int, position: int, token: int, probability: float) -> dict[str, Any]:
            word = t.decode([token])
            if len(top) == 1:
                sequence = t.decode([*ids[1:position], token, *ids[position + 1 : -1]])
            else:
                sequence = "".join([*parts[: 2 * index + 1], word, *parts[2 * index + 2 :]])
            return {"score": probability, "token": token, "token_str": word, "sequence": sequence}

        results = [[entry(n, i, *candidate) for candidate in tokens] for n, (i, tokens) in enumerate(top.items())]
        return results[0] if len(results) == 1 else results

    def top_fillings(self, text: str, k: int) -> list[tuple[str, float]]:
        """Ranks the k likeliest texts with all masks filled, with their probabilities.

        A beam search that fills the mask of the highest probability first, given which the others are predicted again.
        """
        ids = self.encode(text)
        beam = [(0.0, ids)]
        for _ in self.mask_positions(ids):
            extended: dict[tuple[int, ...], float] = {}
            for (total, row), log_probs in zip(beam, self.log_probabilities([row for _, row in beam]), strict=True):
                position = max(log_probs, key=lambda i: log_probs[i].max())
                log_probs_V = log_probs[position]
                for token in np.argsort(-log_probs_V, kind="stable")[:k]:
                    extended[(*row[:position], int(token), *row[position + 1 :])] = total + float(log_probs_V[token])
            best = heapq.nlargest(k, extended.items(), key=lambda item: item[1])
            beam = [(total, list(row)) for row, total in best]
        return [(self._model.tokenizer.decode(row[1:-1]), math.exp(total)) for total, row in beam]

    def unknown(self, text: str, words: list[str]) -> list[str]:
        """Returns the words that the vocabulary cannot spell; their probability is 0."""
        t = self._model.tokenizer
        return [word for word in words if any(t.is_special[i] for i in t.encode_answer(word, text))]

    def rank_words(self, text: str, words: list[str]) -> list[tuple[str, float]]:
        """Ranks given words, with their probabilities.

        A word of several tokens gets as many masks, which are filled from left to right; its probability is the product
        over its tokens.

        Raises:
          UserError: the text has not exactly one [MASK], a word becomes no token, or the text is too long with a word.
        """
        ids = self.encode(text)
        position, *others = self.mask_positions(ids)
        if others:
            raise UserError(f"ranking words needs a text with exactly one [MASK]; this one has {1 + len(others)}")
        tokens_of = {word: self._model.tokenizer.encode_answer(word, text) for word in words}
        if empty := [word for word, tokens in tokens_of.items() if not tokens or not word.strip()]:
            raise UserError(f"the word '{empty[0]}' is empty, or becomes no token; leave it out")
        rows = [ids[:position] + [ids[position]] * len(tokens) + ids[position + 1 :] for tokens in tokens_of.values()]
        self._check_length(max(rows, key=len), "the text with its longest word")
        totals = dict.fromkeys(tokens_of, 0.0)
        for i in range(max(map(len, tokens_of.values()))):
            log_probs = self.log_probabilities(rows)
            for r, (word, tokens) in enumerate(tokens_of.items()):
                if i < len(tokens):
                    totals[word] += float(log_probs[r][position + i][tokens[i]])
                    rows[r][position + i] = tokens[i]
        return sorted(((word, math.exp(total)) for word, total in totals.items()), key=lambda item: -item[1])
