"""The Python interface: `flax_mlm.load` and the model that it returns."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from flax_mlm.config.load import build
from flax_mlm.errors import UserError
from flax_mlm.inference import embeddings, likelihood, mask_filler
from flax_mlm.inference.config import read_config
from flax_mlm.inference.load import LoadedModel, load_model


def load(path: str | os.PathLike[str]) -> "Model":
    """Loads a trained model on all devices of this process.

    Nothing is written, and JAX's global settings stay as they are.

    Args:
      path: the workdir of a run (its newest sound checkpoint), WORKDIR@STEP, the folder of one checkpoint, each also in
        a bucket (gs://...); a Hugging Face folder; or `hf:ORG/NAME[@revision]`, a model of the hub.

    Raises:
      UserError: there is no checkpoint, none is sound, or the folder holds a model that our encoder cannot compute.
    """
    path = os.fspath(path)
    return Model(load_model(path, build(read_config(path))))


class Model:
    """A trained model with its tokenizer.

    Its methods raise UserError where the model computes NaN or infinity.

    Attributes:
      config: the config that it was trained with.
      tokenizer: its tokenizer, of V tokens.
    """

    def __init__(self, model: LoadedModel):
        self._model = model
        self.config, self.tokenizer = model.config, model.tokenizer
        self._encoder = embeddings.make_encoder(model)

    def fill_mask(self, texts: str | Sequence[str], top_k: int = 5) -> list[Any]:
        """Predicts the tokens at the masks of texts, each of them while the other masks stay masked.

        The result is that of transformers' fill-mask pipeline, but special tokens are never predicted.

        Args:
          texts: a text with one or more masks, `[MASK]` or the tokenizer's own, or a list of such texts. The space
            before a mask belongs to it where transformers takes it so.
          top_k: number of predictions for each mask.

        Returns:
          For a text with one mask, a list of `top_k` dicts, the likeliest first, with `score` (probability), `token`
          (id), `token_str`, and `sequence` (the text with the mask filled). For a text with several masks, a list of
          such lists, in whose sequences the other masks are kept. For a list of texts, a list of these.

        Raises:
          UserError: a text has no mask, or more tokens than the model was trained on; the list is empty; or the
            model was not trained with objective mlm.
        """
        if (objective := self.config.objective.name) != "mlm":
            raise UserError(f"objective.name is {objective}; fill_mask needs a model trained with mlm")
        if top_k < 1:
            raise UserError(f"top_k is {top_k}; expected at least 1")
        filler = mask_filler.MaskFiller(self._model)
        if isinstance(texts, str):
            return filler.fill_mask(_checked([texts])[0], top_k)
        return [filler.fill_mask(text, top_k) for text in _checked(texts)]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts as vectors of length 1, by `finetune.pooling`.

        Texts of more than `finetune.max_length` tokens are cut. Vectors are meaningful for search or similarity once
        the encoder is fine-tuned for it (`evaluate --task=retrieval --save`).

        Args:
          texts: N texts.

        Returns:
          float32 (N, D), D being `model.hidden_size`.

        Raises:
          UserError: the list is empty, or the pooling does not suit the model.
        """
        return embeddings.embed(self._model, _checked(texts), self._encoder)

    def logits(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Computes the logits at every token of texts, special tokens included.

        Args:
          texts: N texts; `[MASK]` in a text is the mask token.

        Returns:
          N arrays, float32 (L_i, V), L_i being the number of tokens of text i with [CLS] and [SEP]. The logits of a
          masked model at position p are those of token p, those of a causal one those of token p + 1.

        Raises:
          UserError: a text has more tokens than the model was trained on; the list is empty; or the model was trained
            with objective rtd, and so has no logits over the vocabulary.
        """
        if self.config.objective.name == "rtd":
            raise UserError("objective.name is rtd; its encoder has no logits over the vocabulary; use mlm or clm")
        t, limit = self.tokenizer, self._model.max_length
        rows = [[t.cls_id, *t.encode_with_mask(text), t.sep_id] for text in _checked(texts)]
        for number, row in enumerate(rows, 1):
            if len(row) > limit:
                raise UserError(f"text {number} has {len(row)} tokens; expected at most {limit}")
        outputs = embeddings.row_outputs(self._model, rows)
        results = {i: logits_LV[:, : t.vocab_size].copy() for i, _, logits_LV in outputs}
        return [results[i] for i in range(len(rows))]

    def log_likelihood(self, texts: Sequence[str]) -> np.ndarray:
        """Computes log-likelihoods of texts in nats, special tokens not counted.

        They are exact for a causal model, and pseudo-log-likelihoods for a masked one: the sum of the log-probabilities
        of its tokens, each masked together with the rest of its word (arXiv:2305.10588).

        Args:
          texts: N texts.

        Returns:
          float64 (N,).

        Raises:
          UserError: a text is empty, or has more tokens than the model was trained on; the list is empty; or the model
            was trained with objective rtd.
        """
        return likelihood.log_likelihood(self._model, _checked(texts))


def _checked(texts: Iterable[str]) -> list[str]:
    listed: list[Any] = list(texts) if isinstance(texts, Iterable) else [None]
    if isinstance(texts, str) or not all(isinstance(text, str) for text in listed):
        raise UserError(f"texts is {type(texts).__name__}; expected a list of strings")
    if not listed:
        raise UserError("texts is empty; expected at least one text")
    for number, text in enumerate(listed, 1):
        if not text.isascii() and re.search("[\ud800-\udfff]", text):  # half a character of UTF-16
            raise UserError(f"text {number} has a lone surrogate; expected Unicode, as decode(errors='replace') makes")
    return listed
