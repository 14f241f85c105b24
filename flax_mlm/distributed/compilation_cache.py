"""XLA's persistent compilation cache: what was compiled once is not compiled at a restart, or by another run.

Every use of JAX's private modules for it is here. An entry is used by the program, versions and flags that JAX's key
names, on a processor like the one that it was compiled for, and only as it was written.
"""

import contextlib
import functools
import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

from flax_mlm.storage import files

FOLDER = "~/.cache/flax_mlm/xla"
_LIMIT = 4 << 30  # bytes; the entries that were used last are kept
_SETTINGS = {
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
# Lines of /proc/cpuinfo that name a processor's kind and its features.
_FEATURES = {"vendor_id", "cpu family", "model", "model name", "flags"}  # of x86
_FEATURES |= {"CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"}  # of Arm


def keep(is_on: bool = True) -> None:
    """Turns the cache on for this process and those that it starts, or off. Imports no JAX.

    Its folder is JAX_COMPILATION_CACHE_DIR, or else ~/.cache/flax_mlm/xla. Variables of JAX that the user has set stay.
    Where nothing can be written, the cache is off.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser(FOLDER))
    settings: dict[str, Any] = _SETTINGS | {"jax_compilation_cache_dir": folder}
    if not is_on or not _is_writable(folder):
        settings = {"jax_enable_compilation_cache": False}
        os.environ.pop("JAX_ENABLE_COMPILATION_CACHE", None)
    for name, value in settings.items():
        if name.upper() not in os.environ:
            os.environ[name.upper()] = str(value)
            if jax := sys.modules.get("jax"):  # which has read its variables
                jax.config.update(name, value)


def _is_writable(folder: str) -> bool:
    if not folder or "://" in folder:
        return True  # JAX's own business
    with contextlib.suppress(OSError):
        os.makedirs(folder, mode=0o700, exist_ok=True)  # whoever can write to it can run code
    return os.access(folder, os.W_OK | os.X_OK)


def prepare() -> None:
    """Makes JAX's cache safe. Call it before the first compilation; safe to call again.

    XLA (jaxlib 0.10) loses the order of a program's collectives when it reads the program from a file, and simulated
    CPU devices then wait for each other, each in another collective. So their programs are not kept.
    """
    from jax._src import compilation_cache

    get_key = compilation_cache.get_cache_key
    if get_key.__module__ == __name__:
        return

    def get_key_unless_unsafe(module: Any, devices: Any, *args: Any, **kwargs: Any) -> str | None:
        if devices.size > 1 and devices.flat[0].platform == "cpu":
            return None  # JAX then compiles as without a cache
        return get_key(module, devices, *args, **kwargs)

    compilation_cache.get_cache_key = get_key_unless_unsafe  # type: ignore[assignment]
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if folder and "://" not in folder:  # not in a notebook, say, that uses JAX's cache in its own way
        compilation_cache.get_file_cache = _open  # type: ignore[assignment]


def _open(path: str) -> tuple["Entries", str]:
    return Entries(Path(path)), path


class Entries:
    """Entries in a folder, as JAX's cache wants them; what cannot be read or written counts as not there."""

    def __init__(self, folder: Path, limit: int = _LIMIT):
        self._path, self._limit = folder, limit
        self._size: int | None = None

    def _digest(self, key: str, value: bytes = b"") -> Any:
        return hashlib.sha256(b"\0".join((processor().encode(), key.encode(), value)))

    def _file(self, key: str) -> Path:
        return self._path / self._digest(key).hexdigest()

    def get(self, key: str) -> bytes | None:
        """Returns an entry; None where there is none, or one that is damaged or belongs elsewhere."""
        try:
            content = self._file(key).read_bytes()
            os.utime(self._file(key))
        except OSError:
            return None
        digest, value = content[:32], content[32:]
        return value if digest == self._digest(key, value).digest() else None

    def put(self, key: str, value: bytes) -> None:
        """Writes an entry, and deletes those that were not used for longest where there is no room."""
        with contextlib.suppress(OSError):
            with files.replacing(self._file(key)) as temporary:
                temporary.write_bytes(self._digest(key, value).digest() + value)
            self._size = None if self._size is None else self._size + len(value)
            if self._size is None or self._size > self._limit:
                self._trim()

    def _trim(self) -> None:
        found = [(file.stat(), file) for file in self._path.iterdir() if file.is_file()]
        self._size = sum(status.st_size for status, _ in found)
        for status, file in sorted(found, key=lambda entry: entry[0].st_mtime_ns):
            if self._size <= self._limit:
                break
            file.unlink(missing_ok=True)
            self._size -= status.st_size


@functools.cache
def processor() -> str:
    """The processor and the number of threads: XLA's code depends on them, besides program, version and flags."""
    lines = list[str]()
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        lines = [line for line in first.splitlines() if line.partition("\t")[0] in _FEATURES]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" in flag]
    threads = [str(cores), *flags, *(os.environ.get(name, "") for name in ("NPROC", "JAX_NUM_CPU_DEVICES"))]
    return "\n".join([platform.machine(), platform.processor(), *lines, *threads])
