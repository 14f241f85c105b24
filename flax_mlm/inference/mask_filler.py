"""Answers questions about texts with masks: which words belong there?"""

import heapq
import math

from flax_mlm.errors import UserError

EXAMPLES = (
    "The President of the United [MASK] spoke to Congress.",
    "We must [MASK] the peace of the world.",
    "The [MASK] of the people depends on good laws.",
)


class MaskFiller:
    """Answers questions about masked texts with a trained model. A causal one answers from what is left of a mask."""

    def __init__(self, trained):
        self._trained = trained

    def ids(self, text: str) -> list[int]:
        """[CLS] text [SEP]. Raises UserError when it has no [MASK] or is too long."""
        tokenizer, limit = self._trained.tokenizer, self._trained.row_length
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
        """Of every piece at every mask: for each row, place of the mask -> float32 (V,). Special pieces have none
        (-inf)."""
        import jax
        import numpy as np

        from flax_mlm.distributed.batches import shard_replicated_rows
        from flax_mlm.distributed.mesh import num_batch_shards

        t = self._trained
        ahead = int(t.config.objective.name == "clm")  # a causal model stands before what it predicts
        places = [self.masks(row) for row in rows]
        parts = num_batch_shards(t.mesh)
        shape = -(-len(rows) // parts) * parts, t.padded_length(max(map(len, rows)))
        tokens_BL = np.full(shape, t.tokenizer.pad_id, np.int32)
        predict_BK = np.zeros((len(tokens_BL), max(map(len, places))), np.int32)
        for b, row in enumerate(rows):
            tokens_BL[b, : len(row)] = row
            predict_BK[b, : len(places[b])] = np.array(places[b], np.int32) - ahead
        tokens, predict = shard_replicated_rows([tokens_BL, predict_BK], t.mesh)
        with jax.set_mesh(t.mesh):
            logits_BKV = np.array(t.steps.score(t.params, tokens, predict, t.vocab))[..., : t.tokenizer.vocab_size]
        logits_BKV[..., t.tokenizer.is_special] = -np.inf
        return [dict(zip(some, scores_KV, strict=False)) for some, scores_KV in zip(places, logits_BKV, strict=False)]

    def word(self, piece: int) -> str:
        """A piece as a person reads it; one that continues a word begins with '…'."""
        text = self._trained.tokenizer.decode([piece]).strip() or repr(self._trained.tokenizer.tokens[piece])
        return text if self._trained.tokenizer.starts_word[piece] else f"…{text}"

    def top(self, text: str, k: int) -> list[list[tuple[str, float]]]:
        """For each [MASK], the k likeliest words and their probabilities, the other masks staying masked."""
        import numpy as np

        ids = self.ids(text)
        (scores,) = self.log_probabilities([ids])
        best = {i: np.argsort(-scores_V, kind="stable")[:k] for i, scores_V in scores.items()}
        return [[(self.word(p), math.exp(scores[i][p])) for p in pieces] for i, pieces in best.items()]

    def joint(self, text: str, k: int) -> list[tuple[str, float]]:
        """The k likeliest ways to fill all masks together, and their probabilities.

        A beam search that fills the mask the model is surest of first, and asks again with it filled.
        """
        import numpy as np

        ids = self.ids(text)
        beam = [(0.0, ids)]
        for _ in self.masks(ids):
            grown: dict[tuple[int, ...], float] = {}
            for (total, row), scores in zip(beam, self.log_probabilities([row for _, row in beam]), strict=True):
                place = max(scores, key=lambda i: scores[i].max())
                for piece in np.argsort(-scores[place], kind="stable")[:k]:
                    grown[(*row[:place], int(piece), *row[place + 1 :])] = total + float(scores[place][piece])
            beam = [(total, list(row)) for row, total in heapq.nlargest(k, grown.items(), key=lambda item: item[1])]
        return [(self._trained.tokenizer.decode(row[1:-1]), math.exp(total)) for total, row in beam]

    def targets(self, text: str, words: list[str]) -> list[tuple[str, float]]:
        """The given words ranked, with their probabilities. A word of several pieces is given as many masks, filled
        from left to right; its probability is the product. Raises UserError unless there is exactly one [MASK]."""
        ids = self.ids(text)
        if len(self.masks(ids)) != 1:
            raise UserError(f"--targets needs exactly one [MASK]; the text has {len(self.masks(ids))}")
        (place,) = self.masks(ids)
        pieces = {word: self._trained.tokenizer.encode_answer(word, text) for word in words}
        for word, spelled in pieces.items():
            if not spelled:
                raise UserError(f"--targets: '{word}' is empty; give words separated by commas")
        rows = [ids[:place] + [ids[place]] * len(spelled) + ids[place + 1 :] for spelled in pieces.values()]
        if (longest := max(map(len, rows))) > (limit := self._trained.row_length):
            raise UserError(f"the text with its longest target has {longest} tokens; this model takes at most {limit}")
        totals = dict.fromkeys(pieces, 0.0)
        for depth in range(max(map(len, pieces.values()))):
            scores = self.log_probabilities(rows)
            for r, (word, spelled) in enumerate(pieces.items()):
                if depth < len(spelled):
                    totals[word] += float(scores[r][place + depth][spelled[depth]])
                    rows[r][place + depth] = spelled[depth]
        return sorted(((w, math.exp(total)) for w, total in totals.items()), key=lambda item: -item[1])
