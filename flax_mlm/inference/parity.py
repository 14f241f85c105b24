"""Parity: compares token ids, hidden states and logits of an exported folder in transformers with ours."""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mlm.data.sources.open import open_source
from flax_mlm.errors import UserError
from flax_mlm.hf import tokenizer_json
from flax_mlm.inference import classify, embeddings
from flax_mlm.inference.load import LoadedModel

_TEXTS = 64
_AUTO_CLASSES = {"mlm": "AutoModelForMaskedLM", "clm": "AutoModelForCausalLM", "rtd": "AutoModelForPreTraining"}
_AUTO_CLASSES_OF_TASKS = {
    "classification": "AutoModelForSequenceClassification",
    "tagging": "AutoModelForTokenClassification",
}
_SHOWN = 10  # texts with other ids that are printed
_NOTE = "    note: transformers takes [MASK] and the like in a text for special tokens"
CLOZES = ("The [MASK] sat on the mat.", "[MASK] barked at the mailman.", "It was un[MASK]able, and so [MASK] [MASK].")


class Difference(NamedTuple):
    """Difference between a folder in transformers and our model."""

    texts: int
    other_ids: list[tuple[str, str]]  # texts that transformers tokenizes otherwise, and why
    note: str  # that transformers takes text that spells a special token for that token, if it does
    hidden: float  # largest absolute difference of a hidden state
    logits: float  # largest absolute difference of a logit

    def is_within(self, limit: float) -> bool:
        """Returns whether the numbers agree, and token ids but for ties between two segmentations."""
        agree = self.hidden <= limit and self.logits <= limit  # false for NaN
        return agree and all(why == tokenizer_json.TIE for _, why in self.other_ids)

    def lines(self) -> list[str]:
        """Formats the difference for a person."""
        same = self.texts - len(self.other_ids)
        return [
            f"token ids     the same for {same} of {self.texts} texts",
            *(f"    not for {text!r}: {why}" for text, why in self.other_ids[:_SHOWN]),
            *([f"    and {len(self.other_ids) - _SHOWN} more"] if len(self.other_ids) > _SHOWN else []),
            *([self.note] if self.note else []),
            f"hidden states largest difference {self.hidden:.1e}",
            f"logits        largest difference {self.logits:.1e}",
        ]


def require_transformers() -> None:
    """Raises UserError unless torch and transformers are installed."""
    for package in ("torch", "transformers"):
        if not importlib.util.find_spec(package):
            raise UserError(f"--check needs {package}; pip install torch transformers")


def compare_folder(folder: Path, model: LoadedModel) -> Difference:
    """Compares in float32 on texts of many lengths, including some with masks.

    Token ids are also compared for texts with every added word, and for texts that spell every special token.
    """
    import torch
    import transformers

    tokenizer = model.tokenizer
    transformers.utils.logging.disable_progress_bar()
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    name = _AUTO_CLASSES_OF_TASKS.get(model.task_head.task, "") if model.task_head else ""
    auto_class = getattr(transformers, name or _AUTO_CLASSES[model.config.objective.name])
    net = auto_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    limit = min(model.config.model.max_positions, 512)
    mask = tokenizer.tokens[tokenizer.mask_id]
    words = [f"{word}, or ({word}) {word}s." for word in tokenizer.added_words.values()]
    spelled = [f"a {tokenizer.tokens[i]} b" for i in np.flatnonzero(tokenizer.is_special) if tokenizer.tokens[i]]
    plain = [*_sample_texts(), *words, *spelled]
    texts = [(text, ids.tolist(), True) for text, ids in zip(plain, tokenizer.encode(plain), strict=True)]
    texts = [(text.replace("[MASK]", mask), tokenizer.encode_with_mask(text), False) for text in CLOZES] + texts
    other_ids, rows, note = [], [], ""
    for text, ids, is_plain in texts:
        row = [tokenizer.cls_id, *ids[: limit - 2], tokenizer.sep_id]
        hf_row = hf_tokenizer(text, truncation=True, max_length=limit, split_special_tokens=is_plain)["input_ids"]
        if hf_row != row and text in spelled and tokenizer.is_special[hf_row[1:-1]].any():
            note = _NOTE  # the model itself finds them
        elif hf_row != row:
            other_ids.append((text, tokenizer_json.why(tokenizer, row, hf_row)))
        rows.append(row)
    if not note and hf_tokenizer(spelled)["input_ids"] != hf_tokenizer(spelled, split_special_tokens=True)["input_ids"]:
        note = f"{_NOTE}, unless split_special_tokens=True"
    compared = rows[: len(CLOZES) + 2 * _TEXTS]
    if model.task_head:
        pairs = list(zip(plain[:_TEXTS], plain[1:] + plain[:1], strict=False)) if model.task_head.pairs else []
        limit = min(limit, model.config.finetune.max_length)
        compared = [row if len(row) <= limit else [*row[: limit - 1], tokenizer.sep_id] for row in compared]
        compared += embeddings.tokenize(model, *map(list, zip(*pairs, strict=True))) if pairs else []
        return Difference(len(texts), other_ids, note, *compare_head(net, model, compared))
    return Difference(len(texts), other_ids, note, *compare_outputs(net, model, compared))


def compare_outputs(net: Any, model: LoadedModel, rows: list[list[int]]) -> tuple[float, float]:
    """Returns the largest differences of hidden states and of logits between a torch module and our model.

    Args:
      rows: token ids, special ones included.
    """
    import torch

    hidden = logits = 0.0
    for i, hidden_LD, logits_LV in embeddings.row_outputs(model, rows):
        L = len(rows[i])
        num_pads = min(8, model.config.model.max_positions - L)  # transformers must ignore them
        padded, attended = rows[i] + [model.tokenizer.pad_id] * num_pads, [1] * L + [0] * num_pads
        with torch.no_grad():
            out = net(torch.tensor([padded]), attention_mask=torch.tensor([attended]), output_hidden_states=True)
        # np.maximum, unlike max, keeps a NaN that transformers computes
        hidden = float(np.maximum(hidden, np.abs(hidden_LD - out.hidden_states[-1][0, :L].numpy()).max()))
        logits = float(np.maximum(logits, np.abs(logits_LV - out.logits[0, :L].numpy()).max()))
    return hidden, logits


def compare_head(net: Any, model: LoadedModel, rows: list[list[int]]) -> tuple[float, float]:
    """Returns the largest differences of hidden states and of a task's logits from a torch module.

    Args:
      rows: token ids of texts or pairs, special ones included.
    """
    import torch

    head = model.task_head
    assert head
    states = _hidden_states(model, rows)
    hidden = logits = 0.0
    for row, hidden_LD, ours in zip(rows, states, classify.run_head(model, head, rows), strict=True):
        L = len(row)
        num_pads = min(8, model.config.model.max_positions - L)
        padded, attended = row + [model.tokenizer.pad_id] * num_pads, [1] * L + [0] * num_pads
        inputs = {"input_ids": torch.tensor([padded]), "attention_mask": torch.tensor([attended])}
        if model.config.model.type_vocab_size > 1:
            types_1L = embeddings.token_types(model, jnp.array([padded], jnp.int32))
            inputs["token_type_ids"] = torch.tensor(np.asarray(types_1L, np.int64))
        with torch.no_grad():
            out = net(**inputs, output_hidden_states=True)
        theirs = out.logits[0].numpy()
        hidden = float(np.maximum(hidden, np.abs(hidden_LD - out.hidden_states[-1][0, :L].numpy()).max()))
        logits = float(np.maximum(logits, np.abs(ours - (theirs[:L] if head.per_token else theirs)).max()))
    return hidden, logits


def _hidden_states(model: LoadedModel, rows: list[list[int]]) -> list[np.ndarray]:
    """Computes hidden states, float32 (L, D) a row, with the token types of pairs."""
    encoder = jax.jit(lambda params, tokens_BL: embeddings.hidden_states(model, params, tokens_BL))
    return embeddings.run_batches(model, encoder, model.params, rows, lambda: None)


def _sample_texts() -> list[str]:
    """Returns lines of the built-in corpus, from a word to a page long."""
    chunks = open_source("builtin").chunks()
    lines = [line for chunk in chunks for line in chunk.text.split("\n") if line.strip()]
    return lines[:: len(lines) // _TEXTS][:_TEXTS]
