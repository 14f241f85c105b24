"""The parts of an encoder: projections, norms, dropout, embeddings, rotary positions (arXiv:2104.09864), and one layer.

Letters in array names and in `dims`, the metadata of parameters: B batch, L length, K predictions, D width, E embedding
width, H heads, d head width, F MLP width, V vocabulary, N layers, P positions, T token types; 2 or 3 for fused
projections. Parameters are float32; `model.dtype` is the dtype of the computation.
"""

import enum
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_mlm.config.schema import ModelConfig
from flax_mlm.distributed.fsdp import gather_fsdp
from flax_mlm.distributed.mesh import batch_spec, replicate
from flax_mlm.model.elementwise import ACTIVATIONS, add_bias, geglu, layer_norm
from flax_mlm.model.projection import project

Rotary = tuple[jax.Array, jax.Array]  # cosines and sines


class Site(enum.IntEnum):
    """Where dropout acts; each site of a layer has a mask of its own."""

    ATTENTION_OUTPUT = 0
    MLP_OUTPUT = 1
    ATTENTION_PROBABILITIES = 2
    EMBEDDINGS = 3


def dropout(x: jax.Array, keys_B: jax.Array | None, rate: float, site: Site) -> jax.Array:
    """Applies inverted dropout to x (B, ...); identity if `keys_B` is None.

    Each row has its own key, so that its mask does not depend on how the batch is split.
    """
    if keys_B is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, x.shape[1:]))(keys_B)
    # A product with one factor: XLA would move the constant of jnp.where(keep, x / (1 - rate), 0) and round otherwise.
    return x * jnp.where(keep, 1.0 / (1.0 - rate), 0.0).astype(x.dtype)


def gathered(module: Any, dtype: Any = None) -> Any:
    """Returns a module with its parameters whole along the `fsdp` axis, cast to `dtype` (None: as they are)."""
    return nnx.merge(nnx.graphdef(module), gather_fsdp(nnx.state(module), dtype))


def stacked(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
    """Makes `count` modules as one module whose parameters have a leading dimension of that size."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    states = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(params=key))))(jax.random.split(rngs.params(), count))
    return nnx.merge(graphdef, states)


class Linear(nnx.Module):
    """Weights and biases of a projection. `dims` are the letters of the weights' dimensions, inputs first."""

    def __init__(self, dims: str, shape: tuple[int, ...], num_inputs: int, config: ModelConfig, rngs: nnx.Rngs):
        kernel = config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(kernel, dims=dims)
        if config.use_bias:
            self.bias = nnx.Param(jnp.zeros(shape[num_inputs:]), dims=dims[num_inputs:])

    def __call__(self, equation: str, x: jax.Array, out_dims: str) -> jax.Array:
        """Computes einsum(equation, x, kernel) + bias; `out_dims` are the result's letters after B."""
        y = project(equation, x, self.kernel[...].astype(x.dtype), batch_spec(*out_dims))
        return add_bias(y, self.bias[...].astype(x.dtype)) if hasattr(self, "bias") else y

    def each(self, equation: str, x: jax.Array, out_dims: str) -> list[jax.Array]:
        """Computes __call__ for each of the 2 or 3 kernels fused in one (D, 2 or 3, ...).

        perf(xla-cpu, xla-gpu): one matmul by the fused kernel would cost more, since its result has to be split and
        its gradient joined.
        """
        fused = self.kernel[...].astype(x.dtype)
        kernels = [jnp.squeeze(kernel, 1) for kernel in jax.lax.split(fused, [1] * fused.shape[1], axis=1)]
        ys = [project(equation, x, kernel, batch_spec(*out_dims)) for kernel in kernels]
        if hasattr(self, "bias"):
            biases = jnp.unstack(self.bias[...].astype(x.dtype))
            ys = [add_bias(y, bias) for y, bias in zip(ys, biases, strict=True)]
        return ys


class LayerNorm(nnx.Module):
    """Layer normalisation over the last dimension, of size D or `width`, computed in float32."""

    def __init__(self, config: ModelConfig, width: int = 0):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(width or config.hidden_size), dims="D")
        if config.use_bias:
            self.bias = nnx.Param(jnp.zeros(width or config.hidden_size), dims="D")

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        bias = self.bias[...] if hasattr(self, "bias") else None
        return layer_norm(x_BLD, self.scale[...], bias, self.eps)


class Embeddings(nnx.Module):
    """Token, position and token-type embeddings, summed and normalised."""

    def __init__(self, config: ModelConfig, vocab_rows: int, rngs: nnx.Rngs):
        c = self.config = config
        self.token = self._table("V", vocab_rows, rngs)
        if c.position_embedding == "learned":
            self.position = self._table("P", c.max_positions, rngs)
        if c.type_vocab_size:
            self.token_type = self._table("T", c.type_vocab_size, rngs)
        self.norm = LayerNorm(c, c.embedding_size or c.hidden_size)

    def _table(self, letter: str, rows: int, rngs: nnx.Rngs) -> nnx.Param:
        c = self.config
        width, width_letter = (c.embedding_size, "E") if c.embedding_size else (c.hidden_size, "D")
        values = c.initializer_range * jax.random.normal(rngs.params(), (rows, width), jnp.float32)
        return nnx.Param(values, dims=letter + width_letter)

    def __call__(self, tokens_BL: jax.Array, positions_BL: jax.Array, token_types_BL: jax.Array | None) -> jax.Array:
        """Returns embeddings (B, L, D), or (B, L, E) with `model.embedding_size`, in the dtype of the computation."""
        spec = batch_spec(None, None)
        x_BLD = gather_fsdp(self.token[...]).at[tokens_BL].get(out_sharding=spec)
        if self.config.position_embedding == "learned":
            x_BLD += gather_fsdp(self.position[...]).at[positions_BL].get(out_sharding=spec)
        if self.config.type_vocab_size:
            table_TD = replicate(self.token_type[...])
            x_BLD += (
                table_TD[None, :1] if token_types_BL is None else table_TD.at[token_types_BL].get(out_sharding=spec)
            )
        return self.norm(x_BLD).astype(self.config.dtype)


def rotary_table(positions_BL: jax.Array, head_width: int, theta: float) -> Rotary:
    """Computes the cosines and sines of every position's angles, float32 (B, L, 1, head_width / 2)."""
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = (positions_BL.astype(jnp.float32)[..., None] * frequencies[None, None])[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLHd: jax.Array, table: Rotary) -> jax.Array:
    """Rotates each pair (x[i], x[i + d/2]) by its position's angle; computed in float32, returned in x's dtype."""
    cos, sin = table
    x = x_BLHd.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    # perf(xla-cpu): a sum of two products; concatenating two rotated halves would run on one core.
    cos = jnp.concatenate([cos, cos], axis=-1)
    sin = jnp.concatenate([-sin, sin], axis=-1)
    return (x * cos + jnp.concatenate([second, first], axis=-1) * sin).astype(x_BLHd.dtype)


class Layer(nnx.Module):
    """Self-attention and MLP, each with a norm and a residual connection."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = self.config = config
        width, heads, inner = c.hidden_size, c.num_heads, c.intermediate_size
        head = width // heads
        self.qkv = Linear("D3Hd", (width, 3, heads, head), 1, c, rngs)
        self.attention_out = Linear("HdD", (heads, head, width), 2, c, rngs)
        if c.norm_position == "post":
            self.attention_norm = LayerNorm(c)  # pre-norm: see Encoder.attention_norms
        self.mlp_in = Linear("D2F" if c.glu else "DF", (width, 2, inner) if c.glu else (width, inner), 1, c, rngs)
        self.mlp_out = Linear("FD", (inner, width), 1, c, rngs)
        self.mlp_norm = LayerNorm(c)

    def __call__(
        self, x_BLD: jax.Array, attend: Callable, rotary: Rotary | None, norm: Callable | None, keys_B: jax.Array | None
    ) -> jax.Array:
        """Computes the hidden states (B, L, D) after this layer.

        Args:
          attend: (q, k, v, *, drop) -> (B, L, H, d), see `attention.types.Attend`; with the windows of this layer.
          rotary: None: position embeddings are learned.
          norm: With `norm_position = pre`: the norm before attention, (B, L, D) -> (B, L, D); None: x_BLD is normalised
            already.
          keys_B: One dropout key per row; None: no dropout.
        """
        drop = functools.partial(dropout, keys_B=keys_B, rate=self.config.dropout_rate)
        if self.config.norm_position == "post":
            attended_BLD = self._attention(x_BLD, attend, rotary, keys_B)
            x_BLD = self.attention_norm(x_BLD + drop(attended_BLD, site=Site.ATTENTION_OUTPUT))
            return self.mlp_norm(x_BLD + drop(self._mlp(x_BLD), site=Site.MLP_OUTPUT))
        attended_BLD = self._attention(norm(x_BLD) if norm else x_BLD, attend, rotary, keys_B)
        x_BLD = x_BLD + drop(attended_BLD, site=Site.ATTENTION_OUTPUT)
        return x_BLD + drop(self._mlp(self.mlp_norm(x_BLD)), site=Site.MLP_OUTPUT)

    @jax.named_scope("attention")
    def _attention(self, x_BLD: jax.Array, attend: Any, rotary: Rotary | None, keys_B: Any) -> jax.Array:
        q, k, v = self.qkv.each("BLD,DHd->BLHd", x_BLD, "LHd")
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        drop, rate = None, self.config.attention_dropout_rate
        if keys_B is not None and rate > 0.0:
            drop = functools.partial(dropout, keys_B=keys_B, rate=rate, site=Site.ATTENTION_PROBABILITIES)
        return self.attention_out("BLHd,HdD->BLD", attend(q, k, v, drop=drop), "LD")

    @jax.named_scope("mlp")
    def _mlp(self, x_BLD: jax.Array) -> jax.Array:
        if self.config.glu:
            h_BLF = geglu(*self.mlp_in.each("BLD,DF->BLF", x_BLD, "LF"))
        else:
            h_BLF = ACTIVATIONS[self.config.activation](self.mlp_in("BLD,DF->BLF", x_BLD, "LF"))
        return self.mlp_out("BLF,FD->BLD", h_BLF, "LD")
