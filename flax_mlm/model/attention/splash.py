"""Attention on TPUs by JAX's splash kernel: no (L, L) array in memory, and no work for blocks outside a window.

The kernel is flash attention (arXiv:2205.14135) with segment ids and a mask known at compile time. It runs under a
shard_map, since a kernel computes one device's rows and heads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from flax_mlm.distributed.mesh import per_row_and_head
from flax_mlm.model.attention.types import SAVED, Attend, Drop

_BLOCK_SIZES = (512, 256, 128)  # the largest that divides L is used


def splash(segment_ids_BL: jax.Array, causal: bool, windows: Sequence[int | None], interpret: bool = False) -> Attend:
    """Builds attention as `xla` does, without dropout.

    Args:
      segment_ids_BL: int32; L a multiple of 128.
      interpret: Run the kernel in Python, on any device.
    """
    length = segment_ids_BL.shape[1]

    def attend_on_device(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, layer_type: jax.Array) -> jax.Array:
        def run(window: int | None) -> Callable[..., jax.Array]:
            attention = _make_kernel(q.shape[2], length, causal, window, interpret)
            return jax.vmap(lambda q, k, v, ids: attention(q, k, v, segment_ids=kernel.SegmentIds(ids, ids)))

        # perf(xla-tpu): transposed before the choice; inside it, a step of ModernBERT-base moves 32% more on v5e.
        arguments = (*(x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v)), ids)
        return jax.lax.switch(layer_type, [run(window) for window in windows], *arguments).swapaxes(1, 2)

    def attend(layer_type: Any, *qkv_BLHd: jax.Array, drop: Drop | None = None) -> jax.Array:
        return per_row_and_head(attend_on_device, qkv_BLHd, segment_ids_BL, jnp.int32(layer_type))

    return attend


def _make_kernel(heads: int, length: int, causal: bool, window: int | None, interpret: bool) -> Any:
    reach = None if window is None else window // 2
    mask: masks.Mask = masks.FullMask((length, length))
    if causal or window is not None:
        mask = masks.LocalMask((length, length), (reach, 0 if causal else reach), 0)
    size = next(n for n in _BLOCK_SIZES if length % n == 0)
    blocks = kernel.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    )
    return kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1,
        residual_checkpoint_name=SAVED, interpret=interpret,
    )  # fmt: skip
