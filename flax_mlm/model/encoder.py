"""One encoder for BERT, ModernBERT, ALBERT and what lies between. Letters in array names: see layers.py.

BERT (arXiv:1810.04805): post-norm, learned positions, biases, GELU, token types.
ModernBERT (arXiv:2412.13663): pre-norm, rotary positions with one θ for global and one for local layers, GeGLU,
no biases, a window in most layers, a final norm.
ALBERT (arXiv:1909.11942): BERT with narrower embeddings and the weights of one layer used N times.
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
from flax_mlm.model import layers, projection
from flax_mlm.model.attention import types
from flax_mlm.model.attention.dispatch import select_kernel
from flax_mlm.model.layers import Rotary

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
        self.embeddings = layers.Embeddings(c, vocab_rows, rngs)
        if c.embedding_size:
            self.projection = layers.Linear("ED", (c.embedding_size, c.hidden_size), 1, c, rngs)
        self.layers = layers.stacked(lambda r: layers.Layer(c, r), 1 if c.share_layers else c.num_layers, rngs)
        if c.norm_position == "pre":
            # Layer 0 has no attention norm: the embeddings are normalised already (arXiv:2412.13663 §2.1.1).
            if c.num_layers > 1:
                self.attention_norms = layers.stacked(lambda r: layers.LayerNorm(c), c.num_layers - 1, rngs)
            self.final_norm = layers.LayerNorm(c)

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
            x_BLD = layers.dropout(x_BLD, dropout_keys_B, self.config.dropout_rate, layers.Site.EMBEDDINGS)
            if self.config.embedding_size:
                x_BLD = layers.gathered(self.projection)("BLE,ED->BLD", x_BLD, "LD")
        attend, rotary = self._attention(segment_ids_BL, positions_BL, causal, dropout_keys_B is not None)
        with jax.named_scope("layers"):
            x_BLD = self._apply_layers(x_BLD, attend, rotary, dropout_keys_B)
        return self.final_norm(x_BLD) if self.config.norm_position == "pre" else x_BLD

    def _attention(self, segment_ids_BL: jax.Array, positions_BL: jax.Array, causal: bool, has_dropout: bool) -> tuple:
        """Builds the attention and the rotary tables (or None) of the layer types: [global], or [global, local]."""
        c = self.config
        layer_types = [(None, c.rope_theta_global), (c.sliding_window, c.rope_theta_local)]
        windows, thetas = zip(*layer_types[: c.global_attn_every_n_layers], strict=True)  # 1: all layers are global
        kernel = select_kernel(c.attention, segment_ids_BL.shape[1], has_dropout and c.attention_dropout_rate > 0.0)
        attend, rotary = kernel(segment_ids_BL, causal, windows), None
        if c.position_embedding == "rope":
            tables = [layers.rotary_table(positions_BL, c.hidden_size // c.num_heads, theta) for theta in thetas]
            rotary = jax.tree.map(lambda *t: jnp.stack(t), *tables)
        return attend, rotary

    def _apply_layers(self, x_BLD: jax.Array, attend: types.Attend, rotary: Rotary | None, keys_B: Any) -> jax.Array:
        """Scans over the layers; each picks the attention of its type.

        perf(xla-tpu): a body of a whole period, such as [global, local, local] with static windows, would need no
        choice, but the compiler schedules it badly: 53% more memory traffic for ModernBERT-base on v5e.
        """
        c = self.config
        norms = None
        if hasattr(self, "attention_norms"):  # row 0 is never used
            norms = jax.tree.map(lambda p: jnp.concatenate([p[:1], p]), nnx.state(self.attention_norms))
        params = None if c.share_layers else nnx.state(self.layers)
        step: Callable[..., Any] = functools.partial(self._apply_layer, attend, rotary, keys_B)
        if c.remat != "none" or splits_parameters():
            # Unrolled, XLA would merge the recomputation with the forward pass: prevent_cse.
            step = jax.checkpoint(step, policy=_REMAT_POLICIES[c.remat], prevent_cse=not c.scan_layers)
        xs = (np.arange(c.num_layers, dtype=np.int32), params, norms)
        x_BLD, _ = jax.lax.scan(step, x_BLD, xs, unroll=not c.scan_layers)
        return x_BLD

    def _apply_layer(
        self, attend: types.Attend, rotary: Rotary | None, keys_B: Any, x_BLD: jax.Array, xs: tuple[Any, Any, Any]
    ) -> tuple[jax.Array, None]:
        """Applies the layer `xs`: (index, its parameters, those of its attention norm); the body of a scan."""
        index, params, norm_params = xs
        if self.config.share_layers:
            params = jax.tree.map(lambda p: p[0], nnx.state(self.layers))
        layer = nnx.merge(nnx.graphdef(self.layers), gather_fsdp(params, self.config.dtype))
        layer_type = (index % self.config.global_attn_every_n_layers > 0).astype(jnp.int32)
        if keys_B is not None:
            keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)

        def norm(x_BLD: jax.Array) -> jax.Array:
            attention_norm = nnx.merge(nnx.graphdef(self.attention_norms), norm_params)
            return jnp.where(index == 0, x_BLD, attention_norm(x_BLD))

        table = jax.tree.map(lambda tables: tables[layer_type], rotary)
        attend = functools.partial(attend, layer_type)
        return layer(x_BLD, attend, table, None if norm_params is None else norm, keys_B), None
