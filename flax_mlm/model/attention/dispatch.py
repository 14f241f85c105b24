"""The choice of an attention kernel: by config, device, row length and dropout."""

import functools
import math
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flax_mlm.config.schema import Config, MeshConfig
from flax_mlm.distributed.mesh import batch_spec, make_mesh, use_mesh
from flax_mlm.errors import UserError
from flax_mlm.model.attention.types import Kernel
from flax_mlm.model.attention.xla import cudnn, xla

_MIN_LENGTH = {"tpu": 512, "gpu": 128}  # row length from which on a kernel costs less than (L, L) arrays
_PLATFORM_OF_KERNEL = {"splash": "tpu", "cudnn": "gpu"}


def resolve_attention(config: Config, platform: str, cudnn_works: Callable[[int], bool] | None = None) -> str:
    """Resolves `model.attention` for the devices of a platform: "xla", "splash" or "cudnn".

    Args:
      cudnn_works: Returns whether cuDNN's kernel works for a head width; None: it is tested on the first device.

    Raises:
      UserError: `model.attention` names a kernel that these devices cannot run.
    """
    name = config.model.attention
    if _PLATFORM_OF_KERNEL.get(name, platform) != platform:
        kinds = f"{_PLATFORM_OF_KERNEL[name].upper()}s; the devices here are of kind {platform}"
        raise UserError(f"model.attention is {name}, which runs on {kinds}; use auto or xla")
    if name != "auto":
        return name
    if config.data.seq_len < _MIN_LENGTH.get(platform, math.inf) or config.train.reproducible:
        return "xla"
    if platform == "gpu":
        fits = config.model.dtype == "bfloat16" and config.model.attention_dropout_rate == 0.0
        works = cudnn_works or _cudnn_works
        return "cudnn" if fits and works(config.model.hidden_size // config.model.num_heads) else "xla"
    return "splash"


def select_kernel(name: str, length: int, drops: bool) -> Kernel:
    """Selects the kernel for rows of `length` tokens.

    Falls back to `xla` where the kernel cannot run: with dropout of the probabilities, and for splash unless `length`
    is a multiple of 128.

    Args:
      name: A resolved `model.attention`; "auto" means "xla".
      drops: Probabilities are dropped.
    """
    if name == "cudnn" and not drops:
        return cudnn
    if name == "splash" and not drops and length % 128 == 0:
        from flax_mlm.model.attention.splash import splash  # Pallas takes a second to import

        return splash
    return xla


@functools.cache
def _cudnn_works(head_width: int) -> bool:
    """Tests whether cuDNN's gradients are those of `xla` for heads of this width, and prints why not.

    The answer depends on the GPU and on the installed cuDNN.
    """
    try:
        with use_mesh(make_mesh(MeshConfig(1, 1, 1), jax.local_devices()[:1])):
            expected = _test_gradients(xla, head_width)
            actual = _test_gradients(cudnn, head_width)
        error = jnp.abs(actual - expected).max() / jnp.abs(expected).max()
        if error <= 0.05:
            return True
        reason = f"its gradients differ by {float(error):.0%}"
    except Exception as e:  # any kind: not installed, too old, an unsupported shape
        reason = (str(e) or type(e).__name__).splitlines()[0]
    problem = f"falling back to XLA attention: cuDNN flash attention unavailable ({reason})"
    print(f"model.attention: {problem}", file=sys.stderr, flush=True)
    return False


def _test_gradients(kernel: Kernel, head_width: int) -> jax.Array:
    """Computes a kernel's gradients with respect to random q, k and v: bfloat16 (3, 2, 128, 2, head_width)."""
    segment_ids_BL = jax.reshard(jnp.broadcast_to(jnp.arange(128) // 48, (2, 128)), batch_spec(None))
    attend = kernel(segment_ids_BL, False, [None])

    def loss(qkv: jax.Array) -> jax.Array:
        q, k, v = (jax.reshard(x_BLHd, batch_spec(None, "H", None)) for x_BLHd in qkv)
        return jnp.square(attend(0, q, k, v).astype(jnp.float32)).mean()

    qkv = jax.random.normal(jax.random.key(0, impl="threefry2x32"), (3, 2, 128, 2, head_width), jnp.bfloat16)
    return jax.jit(jax.grad(loss))(qkv)
