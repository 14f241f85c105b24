"""One encoder for BERT, ModernBERT and what lies between.

BERT (arXiv:1810.04805): post-norm, learned positions, biases, GELU, token types.
ModernBERT (arXiv:2412.13663): pre-norm, rotary positions with a θ for global and one for local layers, GeGLU,
no biases, a window in most layers, final norm.
ALBERT (arXiv:1909.11942): as BERT, with narrower embeddings and one layer's weights used N times.

Letters in array names, comments and `dims`: B batch, L length, K predicted slots, D width, E width of the embeddings,
H heads, d head width, F MLP width, V vocabulary, N layers, P positions, T token types, and 2 or 3 for fused
projections.
Parameters are float32; `dtype` is that of the computation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_mlm.config.schema import ModelConfig
from flax_mlm.distributed.fsdp import gather_fsdp, save_all_but_gathered, splits_parameters
from flax_mlm.distributed.mesh import batch_spec, replicate
from flax_mlm.model.attention import types
from flax_mlm.model.attention.dispatch import select_kernel
from flax_mlm.model.attention.rotary import rotary_table, rotate
from flax_mlm.model.elementwise import add_bias, geglu, gelu, layer_norm
from flax_mlm.model.projection import SAVED, project

# Called as drop(x, site): zeroes a share of x. `site` tells the places of one layer apart.
Drop = Callable[[jax.Array, int], jax.Array]


def dropout(x: jax.Array, keys_B: jax.Array | None, rate: float, site: int) -> jax.Array:
    """Inverted dropout. A key for each row, so that a row's mask does not depend on how the batch is split."""
    if keys_B is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, x.shape[1:]))(keys_B)
    # One factor, not a constant and a choice: XLA would move the constant elsewhere, not always to the same place.
    return x * jnp.where(keep, 1.0 / (1.0 - rate), 0.0).astype(x.dtype)


class Linear(nnx.Module):
    """Weights (and biases) of a projection. `dims` are the letters of its dimensions, inputs first."""

    def __init__(self, dims: str, shape: tuple[int, ...], num_inputs: int, config: ModelConfig, rngs: nnx.Rngs):
        self.kernel = nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape), dims=dims)
        if config.use_bias:
            self.bias = nnx.Param(jnp.zeros(shape[num_inputs:]), dims=dims[num_inputs:])

    def __call__(self, equation: str, x: jax.Array, out_dims: str) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        y = project(equation, x, kernel, batch_spec(*out_dims))
        return add_bias(y, self.bias[...].astype(x.dtype)) if hasattr(self, "bias") else y

    def each(self, equation: str, x: jax.Array, out_dims: str) -> list[jax.Array]:
        """By each of the kernels in one of (D, 2 or 3, ...). As one matmul they cost 1 to 4% more, on a CPU and on an
        H200: its result has to be cut, and the gradient of that put together."""
        spec, fused = batch_spec(*out_dims), self.kernel[...].astype(x.dtype)
        kernels = [jnp.squeeze(kernel, 1) for kernel in jax.lax.split(fused, [1] * fused.shape[1], axis=1)]
        ys = [project(equation, x, kernel, spec) for kernel in kernels]
        if hasattr(self, "bias"):
            ys = [add_bias(y, bias) for y, bias in zip(ys, jnp.unstack(self.bias[...].astype(x.dtype)), strict=True)]
        return ys


class LayerNorm(nnx.Module):
    """Layer normalisation over the last dimension, D or `width`, computed in float32."""

    def __init__(self, config: ModelConfig, width: int = 0):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(width or config.hidden_size), dims="D")
        if config.use_bias:
            self.bias = nnx.Param(jnp.zeros(width or config.hidden_size), dims="D")

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        bias = self.bias[...] if hasattr(self, "bias") else None
        return layer_norm(x_BLD, self.scale[...], bias, self.eps)


class Layer(nnx.Module):
    """Attention and MLP, each with its norm and residual."""

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

    def __call__(self, x_BLD: jax.Array, attention_norm: Any, attend: Any, rotary: Any, drop: Drop) -> jax.Array:
        if self.config.norm_position == "post":
            x_BLD = self.attention_norm(x_BLD + drop(self._attention(x_BLD, attend, rotary), 0))
            return self.mlp_norm(x_BLD + drop(self._mlp(x_BLD), 1))
        x_BLD = x_BLD + drop(self._attention(attention_norm(x_BLD), attend, rotary), 0)
        return x_BLD + drop(self._mlp(self.mlp_norm(x_BLD)), 1)

    @jax.named_scope("attention")
    def _attention(self, x_BLD: jax.Array, attend: Any, rotary: Any) -> jax.Array:
        q, k, v = self.qkv.each("BLD,DHd->BLHd", x_BLD, "LHd")
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.attention_out("BLHd,HdD->BLD", attend(q, k, v), "LD")

    @jax.named_scope("mlp")
    def _mlp(self, x_BLD: jax.Array) -> jax.Array:
        if self.config.glu:
            h_BLF = geglu(*self.mlp_in.each("BLD,DF->BLF", x_BLD, "LF"))
        else:
            h_BLF = gelu(self.mlp_in("BLD,DF->BLF", x_BLD, "LF"))
        return self.mlp_out("BLF,FD->BLD", h_BLF, "LD")


class Embeddings(nnx.Module):
    """Token, position and token-type embeddings, summed and normalised."""

    def __init__(self, config: ModelConfig, vocab_rows: int, rngs: nnx.Rngs):
        c = self.config = config

        width, letter = (c.embedding_size, "E") if c.embedding_size else (c.hidden_size, "D")

        def table(letters: str, rows: int) -> nnx.Param:
            return nnx.Param(
                c.initializer_range * jax.random.normal(rngs.params(), (rows, width)), dims=letters + letter
            )

        self.token = table("V", vocab_rows)
        if c.position_embedding == "learned":
            self.position = table("P", c.max_positions)
        if c.type_vocab_size:
            self.token_type = table("T", c.type_vocab_size)
        self.norm = LayerNorm(c, width)

    def __call__(self, tokens_BL: jax.Array, positions_BL: jax.Array, token_types_BL: jax.Array | None) -> jax.Array:
        rows = batch_spec(None, None)
        x_BLD = gather_fsdp(self.token[...]).at[tokens_BL].get(out_sharding=rows)
        if self.config.position_embedding == "learned":
            x_BLD += gather_fsdp(self.position[...]).at[positions_BL].get(out_sharding=rows)
        if self.config.type_vocab_size:
            table_TD = replicate(self.token_type[...])
            x_BLD += table_TD[0] if token_types_BL is None else table_TD.at[token_types_BL].get(out_sharding=rows)
        return self.norm(x_BLD).astype(self.config.dtype)


def scans_layers(config: ModelConfig, platform: str, fsdp: int) -> bool:
    """What `model.scan_layers` comes to. A scan copies what it keeps of each layer: on two CPU cores that costs 6 to 8%
    of a step's time (12 layers of 768, 4 of 256), on an H200 a fifth (BERT-base, 512 tokens). It compiles one layer
    instead of all, and with FSDP it gathers them one by one."""
    if config.scan_layers is not None:
        return config.scan_layers
    unrolled = {"cpu": 12, "gpu": 24 if fsdp == 1 else 0}  # layers at most
    return config.num_layers > unrolled.get(platform, 0)


class Encoder(nnx.Module):
    """Embeddings and N layers, whose parameters are stacked along a leading N (1 when they share them)."""

    def __init__(self, config: ModelConfig, vocab_rows: int, rngs: nnx.Rngs):
        c = self.config = config
        self.embeddings = Embeddings(c, vocab_rows, rngs)
        if c.embedding_size:
            self.projection = Linear("ED", (c.embedding_size, c.hidden_size), 1, c, rngs)
        self.layers = _stack(lambda r: Layer(c, r), 1 if c.share_layers else c.num_layers, rngs)
        if c.norm_position == "pre":
            # Layer 0 has no attention norm: the embeddings are normalised already (arXiv:2412.13663 §2.1.1).
            if c.num_layers > 1:
                self.attention_norms = _stack(lambda r: LayerNorm(c), c.num_layers - 1, rngs)
            self.final_norm = LayerNorm(c)

    def __call__(
        self,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array,
        positions_BL: jax.Array,
        *,
        causal: bool = False,
        token_types_BL: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states (B, L, D), in the dtype of the computation.

        Args:
          tokens_BL, segment_ids_BL, positions_BL: int32; attention stays inside a segment, positions restart in it.
          causal: attend to the left only.
          token_types_BL: int32; None: type 0 throughout.
          dropout_keys_B: one key a row; None: no dropout.
        """
        c = self.config
        with jax.named_scope("embeddings"):
            x_BLD = self.embeddings(tokens_BL, positions_BL, token_types_BL)
            x_BLD = dropout(x_BLD, dropout_keys_B, c.dropout_rate, site=3)
            if c.embedding_size:
                projection = nnx.merge(nnx.graphdef(self.projection), gather_fsdp(nnx.state(self.projection)))
                x_BLD = projection("BLE,ED->BLD", x_BLD, "LD")
        # Per kind of layer, stacked: [0] global, [1] local. A layer picks its own inside the scan.
        kinds: list[tuple[int | None, float]] = [(None, c.rope_theta_global)]
        if c.global_attn_every_n_layers > 1:
            kinds.append((c.sliding_window, c.rope_theta_local))
        drops = dropout_keys_B is not None and c.attention_dropout_rate > 0.0
        kernel = select_kernel(c.attention, tokens_BL.shape[1], drops)
        attends = [kernel(segment_ids_BL, causal, window) for window, _ in kinds]
        rotary = None
        if c.position_embedding == "rope":
            tables = [rotary_table(positions_BL, c.hidden_size // c.num_heads, theta) for _, theta in kinds]
            rotary = jax.tree.map(lambda *t: jnp.stack(t), *tables)

        graphdef, layers = nnx.split(self.layers)
        norm_graphdef, norms = None, None
        if c.norm_position == "pre" and c.num_layers > 1:
            norm_graphdef, norms = nnx.split(self.attention_norms)
            norms = jax.tree.map(lambda p: jnp.concatenate([p[:1], p]), norms)  # row 0 is never used

        def layer_step(x_BLD: jax.Array, scanned: Any) -> tuple[jax.Array, None]:
            index, layer_params, norm_params = scanned
            layer_params = jax.tree.map(lambda p: p[0], layers) if c.share_layers else layer_params
            layer_params = gather_fsdp(layer_params, c.dtype)
            is_local = (index % c.global_attn_every_n_layers > 0).astype(jnp.int32)
            keys_B = None
            if dropout_keys_B is not None:
                keys_B = jax.vmap(lambda key: jax.random.fold_in(key, index))(dropout_keys_B)

            def drop(x: jax.Array, site: int) -> jax.Array:
                return dropout(x, keys_B, c.attention_dropout_rate if site == 2 else c.dropout_rate, site)

            def attention_norm(x_BLD: jax.Array) -> jax.Array:
                if norm_graphdef is None:
                    return x_BLD
                return jnp.where(index == 0, x_BLD, nnx.merge(norm_graphdef, norm_params)(x_BLD))

            layer = nnx.merge(graphdef, layer_params)
            tables = jax.tree.map(lambda t: t[is_local], rotary)

            def attend(q_BLHd: jax.Array, k_BLHd: jax.Array, v_BLHd: jax.Array) -> jax.Array:
                drop_weights = (lambda weights: drop(weights, 2)) if drops else None
                branches = [functools.partial(attend, drop=drop_weights) for attend in attends]
                return jax.lax.switch(is_local, branches, q_BLHd, k_BLHd, v_BLHd)

            return layer(x_BLD, attention_norm, attend, tables, drop), None

        dots = jax.checkpoint_policies.save_only_these_names(types.SAVED, SAVED)
        policy = {"none": save_all_but_gathered, "dots": dots, "full": None}[c.remat]
        if c.remat != "none" or splits_parameters():
            # Unrolled, the compiler would see twice the same computation and do it once.
            layer_step = jax.checkpoint(layer_step, policy=policy, prevent_cse=not c.scan_layers)
        indices = np.arange(c.num_layers, dtype=np.int32)
        with jax.named_scope("layers"):
            scanned = (indices, None if c.share_layers else layers, norms)
            x_BLD, _ = jax.lax.scan(layer_step, x_BLD, scanned, unroll=not c.scan_layers)
        return self.final_norm(x_BLD) if c.norm_position == "pre" else x_BLD


def _stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules of one kind as one module whose parameters have a leading dimension."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    states = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(params=key))))(jax.random.split(rngs.params(), count))
    return nnx.merge(graphdef, states)
