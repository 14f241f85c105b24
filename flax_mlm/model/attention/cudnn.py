"""Flash attention (arXiv:2205.14135) by cuDNN, in bfloat16."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax

from flax_mlm.distributed.mesh import per_row_and_head
from flax_mlm.model.attention.masks import layer_mask, split_blocks
from flax_mlm.model.attention.types import Attend, switch_layer_type


def cudnn(
    segment_ids_BL: jax.Array,
    causal: bool,
    windows: Sequence[int | None],
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Attend:
    """Builds attention as `xla` does, without dropout.

    cuDNN knows neither segments nor two-sided windows, so it gets masks, one for all heads.

    Args:
      implementation: "xla" computes the same on any device.
    """

    def attend_on_device(q_BLHd: jax.Array, k_BLHd: jax.Array, v_BLHd: jax.Array, mask: jax.Array) -> jax.Array:
        arrays = (*split_blocks(q_BLHd, k_BLHd, v_BLHd, mask), mask)
        q, k, v, mask = (x.reshape(-1, *x.shape[-3:]) for x in arrays)  # cuDNN takes a block as a row
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
        return y.reshape(q_BLHd.shape)

    def attend_within(window: int | None) -> Callable[..., jax.Array]:
        mask = layer_mask(segment_ids_BL, causal, window)
        return lambda *qkv_BLHd, drop: per_row_and_head(attend_on_device, qkv_BLHd, mask)

    return switch_layer_type(attend_within, windows)
