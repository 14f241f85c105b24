"""Answers questions about texts with masks: which words belong there?"""

import heapq
import math

from flax_mlm.errors import UserError

EXAMPLES = (
    "The President of the United [MASK] spoke to Congress.",
    "We must [MASK] the peace of the world.",
    "The [MASK] of the people depends on good laws.",
)


class Filler:
    """Answers questions about masked texts with a trained model. A causal one answers from what is left of a mask."""

    def __init__(self, trained):
        self._trained = trained

    def ids(self, text: str) -> list[int]:
        """[CLS] text [SEP]. Raises UserError when it has no [MASK] or is too long."""
        tokenizer, limit = self._trained.tokenizer, self._trained.config.data.seq_len
        ids = [tokenizer.cls_id, *tokenizer.encode_with_mask(text), tokenizer.sep_id]
        if tokenizer.mask_id not in ids:
            raise UserError(f"the text '{text}' has no [MASK]; put one where a word is wanted")
        if len(ids) > limit:
            raise UserError(f"the text has {len(ids)} tokens; this model was trained on at most {limit}")
        return ids

    def masks(self, ids: list[int]) -> list[int]:
        """Where the masks are."""
        return [i for i, token in enumerate(ids) if token == self._trained.tokenizer.mask_id]

    def log_probabilities(self, rows: list[list[int]]):
        """Of every piece at every position, float32 (len(rows), L, V); special pieces have none (-inf)."""
        import jax
        import numpy as np

        from flax_mlm import sharding

        t = self._trained
        length = t.config.data.seq_len
        parts = t.mesh.size // t.mesh.shape["tensor"]
        tokens_BL = np.full((-(-len(rows) // parts) * parts, length), t.tokenizer.pad_id, np.int32)
        for i, row in enumerate(rows):
            tokens_BL[i, : len(row)] = row
        predict_BL = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BL.shape)
        tokens, predict = sharding.split_rows([tokens_BL, predict_BL], t.mesh)
        with jax.set_mesh(t.mesh):
            scores = t.steps.score(t.params, tokens, predict, t.vocab)
        scores = np.array(scores[: len(rows), :, : t.tokenizer.vocab_size])
        if t.config.objective.name == "clm":
            scores = np.roll(scores, 1, axis=1)  # each place predicts the next one
        scores[:, :, t.tokenizer.is_special] = -np.inf
        return scores

    def word(self, piece: int) -> str:
        """A piece as a person reads it; one that continues a word begins with '…'."""
        text = self._trained.tokenizer.decode([piece]).strip() or repr(self._trained.tokenizer.pieces[piece])
        return text if self._trained.tokenizer.starts_word[piece] else f"…{text}"

    def top(self, text: str, k: int) -> list[list[tuple[str, float]]]:
        """For each [MASK], the k likeliest words and their probabilities, the other masks staying masked."""
        import numpy as np

        ids = self.ids(text)
        scores_LV = self.log_probabilities([ids])[0]
        best = {i: np.argsort(-scores_LV[i], kind="stable")[:k] for i in self.masks(ids)}
        return [[(self.word(p), math.exp(scores_LV[i, p])) for p in pieces] for i, pieces in best.items()]

    def joint(self, text: str, k: int) -> list[tuple[str, float]]:
        """The k likeliest ways to fill all masks together, and their probabilities.

        A beam search that fills the mask the model is surest of first, and asks again with it filled.
        """
        import numpy as np

        ids = self.ids(text)
        beam = [(0.0, ids)]
        for _ in self.masks(ids):
            grown: dict[tuple[int, ...], float] = {}
            for (total, row), scores_LV in zip(beam, self.log_probabilities([row for _, row in beam]), strict=True):
                place = max(self.masks(row), key=lambda i: scores_LV[i].max())
                for piece in np.argsort(-scores_LV[place], kind="stable")[:k]:
                    grown[(*row[:place], int(piece), *row[place + 1 :])] = total + float(scores_LV[place, piece])
            beam = [(total, list(row)) for row, total in heapq.nlargest(k, grown.items(), key=lambda item: item[1])]
        return [(self._trained.tokenizer.decode(row[1:-1]), math.exp(total)) for total, row in beam]

    def targets(self, text: str, words: list[str]) -> list[tuple[str, float]]:
        """The given words ranked, with their probabilities. A word of several pieces is given as many masks, filled
        from left to right; its probability is the product. Raises UserError unless there is exactly one [MASK]."""
        ids = self.ids(text)
        if len(self.masks(ids)) != 1:
            raise UserError(f"--targets needs exactly one [MASK]; the text has {len(self.masks(ids))}")
        (place,) = self.masks(ids)
        pieces = {word: [int(p) for p in self._trained.tokenizer.encode([word])[0]] for word in words}
        for word, spelled in pieces.items():
            if not spelled:
                raise UserError(f"--targets: '{word}' is empty; give words separated by commas")
        rows = [ids[:place] + [ids[place]] * len(spelled) + ids[place + 1 :] for spelled in pieces.values()]
        totals = dict.fromkeys(pieces, 0.0)
        for depth in range(max(map(len, pieces.values()))):
            scores_RLV = self.log_probabilities(rows)
            for r, (word, spelled) in enumerate(pieces.items()):
                if depth < len(spelled):
                    totals[word] += float(scores_RLV[r, place + depth, spelled[depth]])
                    rows[r][place + depth] = spelled[depth]
        return sorted(((w, math.exp(total)) for w, total in totals.items()), key=lambda item: -item[1])
