"""Attention on TPUs by JAX's splash kernel: no (L, L) array in memory, and no work for blocks outside a window.

The kernel is flash attention (arXiv:2205.14135) with a mask known at compile time and segment ids; here under a
shard_map, since a kernel sees one device's rows and heads.
"""

from collections.abc import Sequence

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from flax_mlm.distributed.mesh import per_row_and_head
from flax_mlm.model.attention import SAVED, Attend, DropProbabilities

_BLOCKS = (512, 256, 128)  # the largest that divides L


def splash(segment_ids_BL: jax.Array, causal: bool, windows: Sequence[int | None], interpret: bool = False) -> Attend:
    """As `attention.plain`, but without dropout.

    Args:
      segment_ids_BL: int32; L a multiple of 128.
      interpret: run the kernel in Python, on any device.
    """
    length = segment_ids_BL.shape[1]

    def make(heads: int, window: int | None) -> kernel.SplashAttentionKernel:
        shape, reach = (length, length), None if window is None else window // 2
        mask: masks.Mask = masks.FullMask(shape)
        if causal or window is not None:
            mask = masks.LocalMask(shape, (reach, 0 if causal else reach), 0)
        size = next(n for n in _BLOCKS if length % n == 0)
        blocks = kernel.BlockSizes(
            block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
        )
        return kernel.make_splash_mha(
            masks.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1,
            residual_checkpoint_name=SAVED, interpret=interpret,
        )  # fmt: skip

    def attend(
        kind: jax.Array, q_BLHd: jax.Array, k_BLHd: jax.Array, v_BLHd: jax.Array, drop: DropProbabilities
    ) -> jax.Array:
        def local(q, k, v, segments, kind):  # one device's rows and heads
            def run(window):
                attention = make(q.shape[2], window)
                return jax.vmap(lambda q, k, v, s: attention(q, k, v, segment_ids=kernel.SegmentIds(s, s)))

            q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
            branches = [run(window) for window in windows]
            y = jax.lax.switch(kind, branches, q, k, v, segments)
            return y.swapaxes(1, 2)

        return per_row_and_head(local, (q_BLHd, k_BLHd, v_BLHd), segment_ids_BL, kind)

    return attend
