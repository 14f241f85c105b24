"""Text embeddings: tokenized texts -> hidden states (B, L, D) -> one pooled vector (B, D) a text."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mlm.data.tables import take
from flax_mlm.distributed.batches import shard_rows
from flax_mlm.distributed.mesh import check_batch, replicate, reshard_like
from flax_mlm.errors import UserError
from flax_mlm.inference.model import LoadedModel

Params = Any  # a dict with the parameters of the encoder under "encoder"
OnBatch = Callable[[], Any]  # called before every batch
Encoder = Callable[[Params, jax.Array, jax.Array], jax.Array]  # params, tokens (B, L), token types (B, L) -> (B, ...)


class TokenizedTexts(NamedTuple):
    """Token ids and token types of N texts, special tokens included."""

    tokens: list[list[int]]
    token_types: list[list[int]]

    def __len__(self) -> int:
        return len(self.tokens)


def tokenize(model: LoadedModel, texts: Sequence[str], pairs: Sequence[str] | None = None) -> TokenizedTexts:
    """Builds `[CLS] text [SEP]`, or `[CLS] text [SEP] pair [SEP]`, of at most `finetune.max_length` tokens.

    A pair that is too long is shortened at its longer text first.
    """
    t, limit = model.tokenizer, min(model.config.finetune.max_length, model.max_length)
    rows = TokenizedTexts([], [])
    seconds = [None] * len(texts) if pairs is None else t.encode(pairs)
    for first, second in zip(t.encode(texts), seconds, strict=True):
        a, b = first.tolist(), [] if second is None else second.tolist()
        room = limit - (2 if second is None else 3)
        if len(a) + len(b) > room:
            short = min(len(a), len(b), room // 2)
            a, b = (a[: room - short], b[:short]) if len(a) >= len(b) else (a[:short], b[: room - short])
        head, tail = [t.cls_id, *a, t.sep_id], [] if second is None else [*b, t.sep_id]
        rows.tokens.append(head + tail)
        rows.token_types.append([0] * len(head) + [1] * len(tail))
    return rows


def pad(model: LoadedModel, texts: TokenizedTexts) -> tuple[np.ndarray, np.ndarray]:
    """Pads texts to tokens and token types, both int32 (B, L)."""
    shape = len(texts), model.padded_length(max(map(len, texts.tokens)))
    tokens_BL, types_BL = np.full(shape, model.tokenizer.pad_id, np.int32), np.zeros(shape, np.int32)
    for b, (tokens, types) in enumerate(zip(*texts, strict=True)):
        tokens_BL[b, : len(tokens)] = tokens
        types_BL[b, : len(tokens)] = types
    return tokens_BL, types_BL


def dropout_keys(key: jax.Array, rows_B: jax.Array) -> jax.Array:
    """Splits a key into one key per row, sharded as `rows_B`."""
    return reshard_like(jax.random.split(key, rows_B.shape[0]), rows_B)


def hidden_states(
    model: LoadedModel, params: Params, tokens_BL: jax.Array, types_BL: jax.Array, keys_B: jax.Array | None = None
) -> jax.Array:
    """Computes hidden states, float32 (B, L, D), of rows that hold one segment each. Call it inside `jax.jit`.

    Args:
      keys_B: keys of dropout; None disables dropout.
    """
    causal, has_types = model.config.objective.name == "clm", model.config.model.type_vocab_size > 1
    segments_BL = (tokens_BL != model.tokenizer.pad_id).astype(jnp.int32)
    positions_BL = reshard_like(jax.lax.broadcasted_iota(jnp.int32, tokens_BL.shape, 1), tokens_BL)
    states_BLD = model.forward.model.encode(
        {**model.params, "encoder": params["encoder"]},
        tokens_BL,
        segments_BL,
        positions_BL,
        causal=causal,
        token_types_BL=types_BL if has_types else None,
        dropout_keys_B=keys_B,
    )
    return states_BLD.astype(jnp.float32)


def pool(model: LoadedModel, states_BLD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Pools hidden states to (B, D) by `finetune.pooling`: first token (`cls`), last token (`last`), or `mean`.

    Raises:
      UserError: the pooling is `cls` and the model causal.
    """
    pooling = model.config.finetune.pooling
    if pooling == "cls":
        if model.config.objective.name == "clm":
            raise UserError(
                "finetune.pooling is cls, but the first token of a causal model sees no other token; use mean or last"
            )
        return states_BLD[:, 0]
    real_BL = tokens_BL != model.tokenizer.pad_id
    if pooling == "last":
        real_BL &= real_BL.sum(1, keepdims=True) == jnp.cumsum(real_BL, axis=1)
    weight_BL1 = real_BL[..., None].astype(states_BLD.dtype)
    return (states_BLD * weight_BL1).sum(1) / jnp.maximum(weight_BL1.sum(1), 1.0)


def make_encoder(model: LoadedModel) -> Encoder:
    """Builds the jitted function (params, tokens, token types) -> pooled hidden states (B, D)."""

    def encode(params: Params, tokens_BL: jax.Array, types_BL: jax.Array) -> jax.Array:
        return pool(model, hidden_states(model, params, tokens_BL, types_BL), tokens_BL)

    return jax.jit(encode)


def check_batches(model: LoadedModel) -> None:
    """Raises UserError with several processes, or where devices cannot divide `finetune.batch_size` evenly."""
    if jax.process_count() > 1:
        raise UserError(
            f"batches of texts need a single process, with all its devices; there are {jax.process_count()}"
        )
    check_batch("finetune.batch_size", model.config.finetune.batch_size, model.mesh)


def run_batches(
    model: LoadedModel, encoder: Encoder, params: Params, texts: TokenizedTexts, on_batch: OnBatch
) -> list[np.ndarray]:
    """Applies a jitted function to batches of texts of similar length.

    Raises:
      UserError: see `check_batches`.

    Returns:
      one float32 array a text, without the batch dimension; a dimension of tokens includes padding at its end.
    """
    check_batches(model)
    size = model.config.finetune.batch_size
    results: list[Any] = [None] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts.tokens[i]))
    with jax.set_mesh(model.mesh):
        for begin in range(0, len(order), size):
            on_batch()
            indices = order[begin : begin + size]
            filled = indices + [indices[-1]] * (size - len(indices))
            tokens, types = shard_rows(list(pad(model, take(texts, filled))), model.mesh)
            rows = np.asarray(replicate(encoder(params, tokens, types)))
            for i, row in zip(indices, rows, strict=False):
                results[i] = row
    return results


def normalize(x_ND: Any) -> Any:
    """Scales rows to length 1; a row of zeros stays zero."""
    square_N1 = (x_ND * x_ND).sum(-1, keepdims=True)
    xp: Any = jnp if isinstance(x_ND, jax.Array) else np
    return x_ND / xp.sqrt(xp.maximum(square_N1, 1e-12))


def embed(
    model: LoadedModel,
    texts: Sequence[str],
    encoder: Encoder | None = None,
    params: Params | None = None,
    on_batch: OnBatch = lambda: None,
) -> np.ndarray:
    """Embeds texts by `finetune.pooling`, cut to `finetune.max_length` tokens.

    Args:
      encoder: `make_encoder(model)`, to compile once for several calls.
      params: parameters to use instead of those of the model.

    Returns:
      vectors of length 1, float32 (N, D).
    """
    encoder, params = encoder or make_encoder(model), model.params if params is None else params
    return normalize(np.stack(run_batches(model, encoder, params, tokenize(model, texts), on_batch)))
