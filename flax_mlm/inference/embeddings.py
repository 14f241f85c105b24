"""Hidden states and logits of rows of tokens, and text embeddings: hidden states (B, L, D) -> pooled (B, D)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mlm.distributed import batches, mesh
from flax_mlm.errors import UserError
from flax_mlm.inference.forward import check_finite
from flax_mlm.inference.load import LoadedModel, OnBatch, Params, pad_rows

_BATCH = 8  # rows whose logits are computed together

Encoder = Callable[[Params, jax.Array], jax.Array]  # params, tokens (B, L) -> (B, ...)


def tokenize(model: LoadedModel, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[list[int]]:
    """Builds `[CLS] text [SEP]`, or `[CLS] text [SEP] pair [SEP]`, of at most `finetune.max_length` tokens.

    A pair that is too long is shortened at its longer text first. RoBERTas have two [SEP] between its texts.
    """
    t, limit = model.tokenizer, min(model.config.finetune.max_length, model.max_length)
    if pairs is None:
        return [[t.cls_id, *ids[: limit - 2].tolist(), t.sep_id] for ids in t.encode(texts)]
    separators = [t.sep_id] * t.pair_separators
    rows, room = [], limit - 2 - len(separators)
    for a, b in zip(t.encode(texts), t.encode(pairs), strict=True):
        if len(a) + len(b) > room:
            short = min(len(a), len(b), room // 2)
            a, b = (a[: room - short], b[:short]) if len(a) >= len(b) else (a[:short], b[: room - short])
        rows.append([t.cls_id, *a.tolist(), *separators, *b.tolist(), t.sep_id])
    return rows


def tokenize_for_vectors(model: LoadedModel, texts: Sequence[str]) -> list[list[int]]:
    """Builds rows as `tokenize` does, of texts with `finetune.prompt` before them."""
    return tokenize(model, [model.config.finetune.prompt + text for text in texts])


def pad(model: LoadedModel, rows: Sequence[list[int]]) -> np.ndarray:
    """Pads rows of tokens to int32 (B, L)."""
    return pad_rows(rows, (len(rows), model.padded_length(max(map(len, rows)))), model.tokenizer.pad_id)


def token_types(model: LoadedModel, tokens_BL: jax.Array) -> jax.Array:
    """Token types, int32 (B, L): 1 for the second text of a pair, after the first [SEP], else 0."""
    t = model.tokenizer
    is_end_BL = (tokens_BL == t.sep_id).astype(jnp.int32)
    num_ends_BL = jnp.cumsum(is_end_BL, axis=1) - is_end_BL - int(t.cls_id == t.sep_id)  # before each token
    return ((num_ends_BL > 0) & (tokens_BL != t.pad_id)).astype(jnp.int32)


def dropout_keys(key: jax.Array, rows_B: jax.Array) -> jax.Array:
    """Splits a key into one key per row, sharded as `rows_B`."""
    return mesh.reshard_like(jax.random.split(key, rows_B.shape[0]), rows_B)


def hidden_states(model: LoadedModel, params: Params, tokens_BL: jax.Array, keys_B: Any = None) -> jax.Array:
    """Computes hidden states, float32 (B, L, D), of rows from `tokenize`. Call it inside `jax.jit`.

    Args:
      keys_B: keys of dropout, one a row; None disables dropout.
    """
    has_types = model.config.model.type_vocab_size > 1
    states_BLD = model.forward.model.encode(
        {**model.params, "encoder": params["encoder"]},
        tokens_BL,
        (tokens_BL != model.tokenizer.pad_id).astype(jnp.int32),
        mesh.reshard_like(jax.lax.broadcasted_iota(jnp.int32, tokens_BL.shape, 1), tokens_BL),
        causal=model.config.objective.name == "clm",
        token_types_BL=token_types(model, tokens_BL) if has_types else None,
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
            what = "finetune.pooling is cls, but the first token of a causal model sees no other token"
            raise UserError(f"{what}; use mean or last")
        return states_BLD[:, 0]
    real_BL = tokens_BL != model.tokenizer.pad_id
    if pooling == "last":
        real_BL &= real_BL.sum(1, keepdims=True) == jnp.cumsum(real_BL, axis=1)
    weight_BL1 = real_BL[..., None].astype(states_BLD.dtype)
    return (states_BLD * weight_BL1).sum(1) / jnp.maximum(weight_BL1.sum(1), 1.0)


def make_encoder(model: LoadedModel) -> Encoder:
    """Builds the jitted function (params, tokens) -> pooled hidden states (B, D)."""
    return jax.jit(lambda params, tokens_BL: pool(model, hidden_states(model, params, tokens_BL), tokens_BL))


def check_batches(model: LoadedModel) -> None:
    """Raises UserError with several processes, or where devices cannot divide `finetune.batch_size` evenly."""
    if (count := jax.process_count()) > 1:
        raise UserError(f"batches of texts need a single process, with all its devices; there are {count}")
    mesh.check_batch("finetune.batch_size", model.config.finetune.batch_size, model.mesh)


def run_batches(
    model: LoadedModel, encoder: Encoder, params: Params, rows: Sequence[list[int]], on_batch: OnBatch
) -> list[np.ndarray]:
    """Applies a jitted function to batches of rows of similar length.

    Args:
      rows: tokens of texts, see `tokenize`.

    Raises:
      UserError: see `check_batches`; NotFinite: the model computes NaN or infinity.

    Returns:
      one float32 array a text, (C,), or (L, C) where the function computes something for every token.
    """
    check_batches(model)
    size = model.config.finetune.batch_size
    results: dict[int, np.ndarray] = {}
    with mesh.use_mesh(model.mesh):
        for indices in _batches_by_length(rows, size):
            on_batch()
            filled = indices + [indices[-1]] * (size - len(indices))
            tokens_BL = batches.shard_rows(pad(model, [rows[i] for i in filled]), model.mesh)
            for i, output in zip(indices, np.asarray(mesh.replicate(encoder(params, tokens_BL))), strict=False):
                results[i] = output if output.ndim == 1 else output[: len(rows[i])]
    check_finite(results)
    return [results[i] for i in range(len(rows))]


def row_outputs(model: LoadedModel, rows: Sequence[list[int]]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Computes hidden states and logits at every token of rows, each of one segment; the shortest rows come first.

    Args:
      rows: token ids with [CLS] and [SEP].

    Yields:
      for each row, its index, hidden states (L, D) and logits (L, V), with rtd (L,), all float32.

    Raises:
      NotFinite: the model computes NaN or infinity.
    """
    model.require_head()
    size = -(-_BATCH // mesh.num_batch_shards(model.mesh)) * mesh.num_batch_shards(model.mesh)
    for indices in _batches_by_length(rows, size):
        shape = size, model.padded_length(len(rows[indices[-1]]))
        tokens_BL = pad_rows([rows[i] for i in indices], shape, model.tokenizer.pad_id)
        with mesh.use_mesh(model.mesh):
            outputs = model.forward.outputs(model.params, batches.shard_rows(tokens_BL, model.mesh), model.vocab)
        for i, *arrays in zip(indices, *map(np.asarray, outputs), strict=False):
            hidden_LD, logits = (array[: len(rows[i])] for array in arrays)
            check_finite((hidden_LD, logits))
            yield i, hidden_LD, logits


def _batches_by_length(rows: Sequence[list[int]], size: int) -> Iterator[list[int]]:
    """Yields the indices of rows in batches of similar length, the shortest first."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return (order[begin : begin + size] for begin in range(0, len(order), size))


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
    """Embeds texts by `finetune.pooling`, after `finetune.prompt` and cut to `finetune.max_length` tokens.

    Args:
      encoder: `make_encoder(model)`, to compile once for several calls.
      params: parameters to use instead of those of the model.

    Returns:
      vectors of length 1, float32 (N, D).
    """
    encoder, params = encoder or make_encoder(model), model.params if params is None else params
    states_ND = np.stack(run_batches(model, encoder, params, tokenize_for_vectors(model, texts), on_batch))
    return normalize(states_ND.astype(np.float64)).astype(np.float32)  # squares overflow float32 before states do
