"""One encoder for BERT, ModernBERT, ALBERT and what lies between. Letters in array names: see layers.py.

BERT (arXiv:1810.04805): post-norm, learned positions, biases, GELU, token types.
ModernBERT (arXiv:2412.13663): pre-norm, rotary positions with one θ for global and one for local layers, GeGLU,
no biases, a window in most layers, a final norm.
ALBERT (arXiv:1909.11942): BERT with narrower embeddings and the weights of one layer used N times.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_mlm.config.schema import ModelConfig
from flax_mlm.distributed.fsdp import gather_fsdp, save_all_but_gathered, splits_parameters
from flax_mlm.model import projection
from flax_mlm.model.attention import types
from flax_mlm.model.attention.dispatch import select_kernel
from flax_mlm.model.attention.rotary import rotary_table
from flax_mlm.model.layers import Embeddings, Layer, LayerAttention, LayerNorm, Linear, Site, dropout, gathered, stacked

_REMAT_POLICIES = {
    "none": save_all_but_gathered,
    "dots": jax.checkpoint_policies.save_only_these_names(types.SAVED, projection.SAVED),
    "full": None,
}


def resolve_scan_layers(config: ModelConfig, platform: str, fsdp: int) -> bool:
    """Resolves `model.scan_layers` for the devices of a platform.

    A scan compiles one layer of each type instead of all, and with FSDP it gathers their parameters one by one.
    """
    if config.scan_layers is not None:
        return config.scan_layers
    # perf(xla-cpu, xla-gpu): a scan copies what it keeps of each layer for the backward pass.
    max_unrolled = {"cpu": 12, "gpu": 24 if fsdp == 1 else 0}
    return config.num_layers > max_unrolled.get(platform, 0)


class Encoder(nnx.Module):
    """Embeddings and N layers, whose parameters are stacked along a leading N (1 if they are shared)."""

    def __init__(self, config: ModelConfig, vocab_rows: int, rngs: nnx.Rngs):
        c = self.config = config
        self.embeddings = Embeddings(c, vocab_rows, rngs)
        if c.embedding_size:
            self.projection = Linear("ED", (c.embedding_size, c.hidden_size), 1, c, rngs)
        self.layers = stacked(lambda r: Layer(c, r), 1 if c.share_layers else c.num_layers, rngs)
        if c.norm_position == "pre":
            # Layer 0 has no attention norm: the embeddings are normalised already (arXiv:2412.13663 §2.1.1).
            if c.num_layers > 1:
                self.attention_norms = stacked(lambda r: LayerNorm(c), c.num_layers - 1, rngs)
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
        """Computes hidden states (B, L, D), in the dtype of the computation.

        Args:
          tokens_BL: int32.
          segment_ids_BL: int32, 0 at padding; tokens attend to their own segment only.
          positions_BL: int32, restarting in each segment.
          causal: Attend to the left only.
          token_types_BL: int32; None: type 0 throughout.
          dropout_keys_B: One key per row; None: no dropout.
        """
        with jax.named_scope("embeddings"):
            x_BLD = self.embeddings(tokens_BL, positions_BL, token_types_BL)
            x_BLD = dropout(x_BLD, dropout_keys_B, self.config.dropout_rate, Site.EMBEDDINGS)
            if self.config.embedding_size:
                x_BLD = gathered(self.projection)("BLE,ED->BLD", x_BLD, "LD")
        attentions = self._attentions(segment_ids_BL, positions_BL, causal, dropout_keys_B is not None)
        with jax.named_scope("layers"):
            x_BLD = self._apply_layers(x_BLD, attentions, dropout_keys_B)
        return self.final_norm(x_BLD) if self.config.norm_position == "pre" else x_BLD

    def _attentions(
        self, segment_ids_BL: jax.Array, positions_BL: jax.Array, causal: bool, has_dropout: bool
    ) -> list[LayerAttention]:
        """Builds the attention of each of the N layers; layers of one type share theirs."""
        c = self.config
        kernel = select_kernel(c.attention, segment_ids_BL.shape[1], has_dropout and c.attention_dropout_rate > 0.0)
        head_width = c.hidden_size // c.num_heads
        layer_types = [(None, c.rope_theta_global), (c.sliding_window, c.rope_theta_local)]
        attentions = []
        for window, theta in layer_types[: c.global_attn_every_n_layers]:  # 1: all layers are global
            rotary = rotary_table(positions_BL, head_width, theta) if c.position_embedding == "rope" else None
            attentions.append(LayerAttention(kernel(segment_ids_BL, causal, window), rotary))
        return [attentions[i % c.global_attn_every_n_layers > 0] for i in range(c.num_layers)]

    def _apply_layers(
        self, x_BLD: jax.Array, attentions: Sequence[LayerAttention], keys_B: jax.Array | None
    ) -> jax.Array:
        """Unrolls the first layers and scans over the others, in periods such as ModernBERT's [local, local, global].

        Unrolled are layer 0 of a pre-norm encoder, which has no attention norm, and layers that do not fill a period.
        """
        c = self.config
        period = c.global_attn_every_n_layers
        periods = (c.num_layers - (c.norm_position == "pre")) // period
        unrolled = c.num_layers - periods * period
        *first, scanned = self._split_layers([1] * unrolled + [periods * period])
        apply = functools.partial(self._apply_run, keys_B)
        for i, layer in enumerate(first):
            x_BLD, _ = apply(attentions[i : i + 1], True, x_BLD, jax.tree.map(lambda p: p[0], layer))
        if period > 1:
            scanned = jax.tree.map(lambda p: p.reshape(periods, period, *p.shape[1:]), scanned)
        if periods:
            body = functools.partial(apply, attentions[unrolled : unrolled + period], not c.scan_layers)
            x_BLD, _ = jax.lax.scan(body, x_BLD, scanned, unroll=not c.scan_layers)
        return x_BLD

    def _split_layers(self, sizes: Sequence[int]) -> list[tuple[Any, Any, Any]]:
        """Splits the N layers into runs: (index, `layers`, `attention_norms`), each array with the layers first.

        `layers` is None if all layers share one, `attention_norms` in layer 0 and in a post-norm encoder.
        """
        layers = np.arange(sum(sizes), dtype=np.int32), None if self.config.share_layers else nnx.state(self.layers)
        norms = nnx.state(self.attention_norms) if hasattr(self, "attention_norms") else None
        runs = zip(_split(layers, sizes), [None, *_split(norms, sizes[1:])], strict=True)
        return [(index, layer, norm) for (index, layer), norm in runs]

    def _apply_run(
        self, keys_B: Any, attentions: Sequence[LayerAttention], prevent_cse: bool, x_BLD: jax.Array, layers: Any
    ) -> tuple[jax.Array, None]:
        """Applies a run of layers. With the first three arguments bound it is the body of a scan.

        Args:
          layers: See `_split_layers`; a single layer is without the leading dimension.
        """
        for i, attention in enumerate(attentions):
            position = i if len(attentions) > 1 else None
            step: Callable[..., jax.Array] = functools.partial(self._apply_layer, position, attention, keys_B)
            if self.config.remat != "none" or splits_parameters():
                # Unrolled, XLA would merge the recomputation with the forward pass: prevent_cse.
                step = jax.checkpoint(step, policy=_REMAT_POLICIES[self.config.remat], prevent_cse=prevent_cse)
            x_BLD = step(x_BLD, layers)
        return x_BLD, None

    def _apply_layer(
        self, i: int | None, attention: LayerAttention, keys_B: Any, x_BLD: jax.Array, layers: tuple[Any, Any, Any]
    ) -> jax.Array:
        """Applies the i-th layer of a run, or a single layer."""
        if i is not None:
            layers = jax.tree.map(lambda p: jnp.squeeze(jax.lax.split(p, (1,) * len(p))[i], 0), layers)
        index, params, norm_params = layers
        if self.config.share_layers:
            params = jax.tree.map(lambda p: p[0], nnx.state(self.layers))
        layer = nnx.merge(nnx.graphdef(self.layers), gather_fsdp(params, self.config.dtype))
        norm = None if norm_params is None else nnx.merge(nnx.graphdef(self.attention_norms), norm_params)
        if keys_B is not None:
            keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
        return layer(x_BLD, attention, norm, keys_B)


def _split(tree: Any, sizes: Sequence[int]) -> list[Any]:
    """Splits the leading dimension of every array into runs of these sizes."""
    leaves, structure = jax.tree.flatten(tree)
    splits = [[x] if len(sizes) == 1 else jax.lax.split(x, sizes) for x in leaves]
    return [jax.tree.unflatten(structure, [split[i] for split in splits]) for i in range(len(sizes))]
