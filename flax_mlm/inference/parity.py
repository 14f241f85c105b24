"""Whether transformers computes from an exported folder what we compute: token ids, hidden states, logits."""

import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_mlm.data import sources
from flax_mlm.distributed.batches import shard_rows
from flax_mlm.distributed.mesh import num_batch_shards
from flax_mlm.errors import UserError
from flax_mlm.hf import tokenizer_json
from flax_mlm.inference.load import LoadedModel

_TEXTS = 64
_ROWS = 8  # at a time
CLOZES = ("The [MASK] sat on the mat.", "[MASK] barked at the mailman.", "It was un[MASK]able, and so [MASK] [MASK].")


class Difference(NamedTuple):
    """Of a folder in transformers from our model."""

    texts: int
    other_ids: list[tuple[str, str]]  # texts that become other tokens, and why
    hidden: float  # largest absolute difference of a hidden state
    logits: float  # and of a score

    def is_same(self, limit: float) -> bool:
        """Whether there is none but rounding, and ties between ways to cut a word."""
        return (
            all(why == tokenizer_json.TIE for _, why in self.other_ids)
            and self.hidden <= limit
            and self.logits <= limit
        )

    def lines(self) -> list[str]:
        """For a person."""
        same = self.texts - len(self.other_ids)
        return [
            f"token ids     the same for {same} of {self.texts} texts"
            + "".join(f"\n    not for {text!r}: {why}" for text, why in self.other_ids),
            f"hidden states largest difference {self.hidden:.1e}",
            f"logits        largest difference {self.logits:.1e}",
        ]


def need() -> None:
    """Raises UserError unless torch and transformers are here."""
    for package in ("torch", "transformers"):
        if not importlib.util.find_spec(package):
            raise UserError(f"--check needs {package}; pip install torch transformers")


def run(folder: Path, model: LoadedModel) -> Difference:
    """Compares on texts of many lengths, in float32, those with masks included."""
    import torch
    import transformers

    objective, tokenizer = model.config.objective.name, model.tokenizer
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    kind = {
        "mlm": transformers.AutoModelForMaskedLM,
        "clm": transformers.AutoModelForCausalLM,
        "rtd": transformers.AutoModelForPreTraining,
    }[objective]
    net = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    texts = real_texts()
    limit = min(model.config.model.max_positions, 512)
    mask = tokenizer.tokens[tokenizer.mask_id]
    pairs = [(text, tokenizer.encode([text])[0].tolist()) for text in texts]
    pairs += [(text.replace("[MASK]", mask), tokenizer.encode_with_mask(text)) for text in CLOZES]
    other, rows = [], []
    for text, ids in pairs:
        ids = [tokenizer.cls_id, *ids[: limit - 2], tokenizer.sep_id]
        found = theirs(text, truncation=True, max_length=limit)["input_ids"]
        if found != ids:
            other.append((text, tokenizer_json.why(tokenizer, ids, found)))
        rows.append(ids)
    return Difference(len(pairs), other, *compare(net, model, rows))


def compare(net: Any, model: LoadedModel, rows: list[list[int]]) -> tuple[float, float]:
    """Largest differences of hidden states and of scores between a module of transformers and our model.

    Args:
      rows: token ids, special ones included.
    """
    import torch

    rows, hidden, logits, run = sorted(rows, key=len), 0.0, 0.0, outputs(model)
    for batch in (rows[i : i + _ROWS] for i in range(0, len(rows), _ROWS)):
        tokens = np.full((len(batch), len(batch[-1])), model.tokenizer.pad_id, np.int32)
        for i, row in enumerate(batch):
            tokens[i, : len(row)] = row
        real = np.arange(tokens.shape[1]) < np.array([[len(row)] for row in batch])
        ours = run(tokens, real)
        with torch.no_grad():
            out = net(torch.tensor(tokens).long(), attention_mask=torch.tensor(real).long(), output_hidden_states=True)
        hidden = max(hidden, float(np.abs(ours[0] - out.hidden_states[-1].numpy())[real].max()))
        logits = max(logits, float(np.abs(ours[1] - out.logits.numpy())[real].max()))
    return hidden, logits


def real_texts() -> list[str]:
    """Lines of the built-in corpus, a word to a page long."""
    parts = sources.open_source("builtin").chunks(Counter())
    lines = [line for _, _, text in parts for line in text.split("\n") if line.strip()]
    return lines[:: len(lines) // _TEXTS][:_TEXTS]


def outputs(model: LoadedModel) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """What gives hidden states (B, L, D) and scores (B, L, V), with rtd (B, L), for tokens (B, L) and which of them are
    real (B, L), each row one segment."""
    net, objective = model.steps.model, model.config.objective.name

    @jax.jit
    def forward(params: Any, *batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        *tokens, predict = batch
        x_BLD = net.encode(params, *tokens, causal=objective == "clm")
        scores = net.head(params, x_BLD)
        return x_BLD, scores if objective == "rtd" else scores(predict)

    def run(tokens_BL: np.ndarray, real_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, length = tokens_BL.shape
        more = (
            (0, -rows % num_batch_shards(model.mesh)),
            (0, -length % 64),
        )  # few shapes, since each is compiled
        places_BL = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BL.shape)
        arrays = [np.pad(x, more) for x in (tokens_BL, real_BL.astype(np.int32), places_BL, places_BL)]
        with jax.set_mesh(model.mesh):
            hidden, scores = forward(model.params, *shard_rows(arrays, model.mesh))
        return np.asarray(hidden)[:rows, :length], np.asarray(scores)[:rows, :length]

    return run
