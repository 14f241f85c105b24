"""Process settings that JAX, tensorstore and etils read once, with the reason for each. Imports no JAX."""

import ctypes
import importlib.util
import mmap
import os
import platform
import sys
import warnings
from pathlib import Path

from flax_mlm.errors import UserError

# On x86 CPUs jaxlib 0.10.2 fuses reductions through YNNPACK and silently returns a wrong sum under jit
# (jax-ml/jax#39103: float32, 32,769 elements). Without its reductions the sum is right, at the same speed.
_RIGHT_SUMS = "--xla_cpu_experimental_ynn_fusion_type=-reduce"

# Otherwise some of XLA's GPU kernels add with atomics, in any order.
_FIXED_ORDER = "--xla_gpu_deterministic_ops=true"

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # <malloc.h>


def prepare(reproducible: int = 0) -> None:
    """Makes CPU results right and CPU steps fast. Safe to call again, and in a notebook.

    XLA reads its flags when JAX starts a backend. If one runs already without the flag for right sums, a warning says
    so.

    Args:
      reproducible: if positive, results are the same on up to this number of devices of a kind.

    Raises:
      UserError: `reproducible` needs settings that the running backend was started without, or JAX's 64-bit numbers are
        on.
    """
    prepare_paths()
    _refuse_x64()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    _keep_freed_memory()
    if platform.machine() in ("x86_64", "AMD64") and not _add_flag(_RIGHT_SUMS):
        what = f"JAX has started without {_RIGHT_SUMS}, so sums of more than 32,768 numbers on x86 CPUs may be wrong"
        warnings.warn(f"{what} (jax-ml/jax#39103); use flax_mlm before the first computation", stacklevel=3)
    if reproducible:
        # XLA:CPU cuts a large matmul by the number of its threads, by default that of cores or of devices.
        threads = str(reproducible)
        if (os.environ.get("NPROC") != threads and _backend_runs()) or not _add_flag(_FIXED_ORDER):
            what = "train.reproducible is True, but JAX has started its backend with other settings"
            remedy = f"set it in the first run of a process, or start Python with NPROC={threads}"
            raise UserError(f"{what}; {remedy} XLA_FLAGS={_FIXED_ORDER}")
        os.environ["NPROC"] = threads


def prepare_paths() -> None:
    """Lets etils.epath reach buckets through gcsfs, and bounds tensorstore's patience. Call before any use of epath.

    By default epath goes through TensorFlow where that is installed: an import of seconds, with credentials, caches
    and retries of its own, and no way to be pointed at a stand-in.
    """
    os.environ["EPATH_USE_TF"] = "0"
    # By default gcsfs asks another service of what kind each bucket is. Only zonal buckets need that.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # By default tensorstore waits without end for a server that accepts a connection and is then silent.
    patience = {"CONNECT_TIMEOUT_SECONDS": "10", "LOW_SPEED_TIME_SECONDS": "60", "LOW_SPEED_LIMIT_BYTES": "1"}
    for name, value in patience.items():
        os.environ.setdefault(f"TENSORSTORE_CURL_{name}", value)


def _refuse_x64() -> None:
    """Raises UserError if JAX computes, or will compute, with 64-bit numbers where no dtype is named."""
    jax, variable = sys.modules.get("jax"), os.environ.get("JAX_ENABLE_X64", "")
    if jax.config.jax_enable_x64 if jax else variable.lower() in ("1", "y", "yes", "t", "true", "on"):
        what = f"jax_enable_x64 is on{' (JAX_ENABLE_X64)' * bool(variable)}; expected off"
        why = "models are trained, saved and read with 32 bits"
        raise UserError(f"{what}, because {why}; unset it, or use flax_mlm in a process of its own")


def _add_flag(flag: str) -> bool:
    """Adds a flag to XLA_FLAGS, unless the user has set it or this jaxlib has no such flag; False if it is too late."""
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.split("=")[0] in flags or not jaxlib_knows(flag):
        return True
    if _backend_runs():
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
    return True


def _backend_runs() -> bool:
    """True if JAX has started a backend in this process."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bool(bridge and getattr(bridge, "backends_are_initialized", lambda: False)())


def jaxlib_knows(flag: str) -> bool:
    """True if this jaxlib has the flag; an unknown one in XLA_FLAGS would abort the process."""
    spec = importlib.util.find_spec("jaxlib")
    name = flag.lstrip("-").split("=")[0].encode()
    for folder in spec.submodule_search_locations or [] if spec else []:
        for library in sorted(Path(folder).glob("*.so"), key=lambda p: -p.stat().st_size):
            with library.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content.find(name) >= 0:
                    return True
    return False


def _keep_freed_memory() -> None:
    """Keeps freed memory in the process (glibc only)."""
    # perf(xla-cpu): XLA allocates and frees its temporaries every step; giving them back to the system each time costs
    # a page fault per 4 KiB, up to 30% of a step.
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
            mallopt(option, value)
