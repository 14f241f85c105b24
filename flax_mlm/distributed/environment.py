"""Process settings that must be in place before JAX starts its backend, with the reason for each."""

import ctypes
import importlib.util
import mmap
import os
import platform
import sys
import warnings
from pathlib import Path

# On x86 CPUs jaxlib 0.10.2 fuses reductions through YNNPACK and silently returns a wrong sum under jit
# (jax-ml/jax#39103: float32, 32,769 elements). Without its reductions the answer is right, at the same speed.
_YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-reduce"

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # <malloc.h>


# Without it some of XLA's GPU kernels add with atomics, in whatever order they come.
_GPU_FLAG = "--xla_gpu_deterministic_ops=true"


def prepare(reproducible: int = 0) -> None:
    """Makes CPU results right and CPU steps fast. Call before anything imports jax; safe to call twice.

    Args:
      reproducible: when positive, results are the same on up to so many devices of a kind.
    """
    prepare_paths()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    wanted = [_YNN_FLAG] if platform.machine() in ("x86_64", "AMD64") else []
    if reproducible:
        wanted.append(_GPU_FLAG)
        # XLA:CPU cuts a large matmul by the number of its threads, which else is that of cores or of devices.
        os.environ["NPROC"] = str(reproducible)
    for flag in wanted:
        flags = os.environ.get("XLA_FLAGS", "")
        if flag.split("=")[0] not in flags and _jaxlib_knows(flag):
            os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
            if _backend_runs():
                warnings.warn(
                    f"JAX has started without {flag}; use flax_mlm before the first computation", stacklevel=3
                )
    _keep_freed_memory()


def prepare_paths() -> None:
    """Has etils.epath reach buckets through gcsfs. Call before anything uses a path of its: it decides once.

    Else it goes through TensorFlow where that is installed: an import of seconds, with its own credentials, caches and
    retries, and without a way to be pointed at a stand-in.
    """
    os.environ["EPATH_USE_TF"] = "0"
    # Else gcsfs asks another service, in another protocol, of what kind each bucket is. Zonal ones need that; the
    # others, hierarchical ones too, are served by the one that tensorstore uses.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # tensorstore would wait for ever for a server that accepts a connection and then is silent.
    patience = {"CONNECT_TIMEOUT_SECONDS": "10", "LOW_SPEED_TIME_SECONDS": "60", "LOW_SPEED_LIMIT_BYTES": "1"}
    for name, value in patience.items():
        os.environ.setdefault(f"TENSORSTORE_CURL_{name}", value)


def _backend_runs() -> bool:
    """Whether JAX has started a backend, which has read XLA_FLAGS."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def _jaxlib_knows(flag: str) -> bool:
    """Whether this jaxlib has the flag; an unknown one in XLA_FLAGS would abort the process."""
    spec = importlib.util.find_spec("jaxlib")
    name = flag.lstrip("-").split("=")[0].encode()
    for folder in spec.submodule_search_locations or [] if spec else []:
        for library in sorted(Path(folder).glob("*.so"), key=lambda p: -p.stat().st_size):
            with library.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content.find(name) >= 0:
                    return True
    return False


def _keep_freed_memory() -> None:
    """XLA:CPU allocates and frees its temporaries every step; giving them back to the system each time costs
    a page fault per 4 KiB, up to 30% of a step (glibc only)."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
            mallopt(option, value)
