"""Compiled programs, kept in a folder for all processes and for later runs of the tests.

They are for one device: XLA (jaxlib 0.10) loses the order of a program's collectives when it reads the program from a
file, and devices then wait for each other, each in another collective.
"""

from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache


def keep(folder: Path) -> None:
    """Keeps in a folder what this process compiles."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    get, put = compilation_cache.get_executable_and_time, compilation_cache.put_executable_and_time

    def get_for_one(key: str, options: Any, backend: Any, devices: Any, *args: Any, **kwargs: Any) -> Any:
        return get(key, options, backend, devices, *args, **kwargs) if len(devices) == 1 else (None, None)

    def put_for_one(key: str, name: str, executable: Any, *args: Any, **kwargs: Any) -> None:
        if len(executable.local_devices()) == 1:
            put(key, name, executable, *args, **kwargs)

    compilation_cache.get_executable_and_time, compilation_cache.put_executable_and_time = get_for_one, put_for_one


def environment(folder: Path) -> dict[str, str]:
    """Environment of a run on one device that keeps what it compiles, too."""
    return {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
