"""Process settings that must be in place before JAX starts its backend, with the reason for each."""

import ctypes
import importlib.util
import mmap
import os
import platform
import sys
from pathlib import Path

# On x86 CPUs jaxlib 0.10.2 fuses reductions through YNNPACK and silently returns a wrong sum under jit
# (jax-ml/jax#39103: float32, 32,769 elements). Without its reductions the answer is right, at the same speed.
_YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-reduce"

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # <malloc.h>


def prepare() -> None:
    """Makes CPU results right and CPU steps fast. Call before anything imports jax; safe to call twice."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    flags = os.environ.get("XLA_FLAGS", "")
    if "ynn_fusion_type" not in flags and platform.machine() in ("x86_64", "AMD64") and _jaxlib_knows(_YNN_FLAG):
        os.environ["XLA_FLAGS"] = f"{flags} {_YNN_FLAG}".strip()
    _keep_freed_memory()


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
