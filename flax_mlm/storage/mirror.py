"""Files that grow, for a bucket, to whose objects nothing can be appended: written here, and copied there whole."""

import shutil
import tempfile
import threading
from pathlib import Path

from etils import epath

from flax_mlm.storage import gcs

_EVERY = 60.0  # seconds


class Mirror:
    """A temporary folder, and a thread that copies to a bucket what has changed in it, once a minute or when told.

    Attributes:
      folder: The folder to write to.
    """

    def __init__(self, target: epath.Path):
        self.folder = Path(tempfile.mkdtemp(prefix="flax_mlm-"))
        self._target, self._copied = target, dict[Path, tuple[int, int]]()
        self._lock, self._wake, self._closed = threading.Lock(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def fetch(self, name: str) -> None:
        """Brings a file here, if it is there. Raises as `gcs.errors` does."""
        if (found := gcs.read(self._target / name)) is not None:
            (self.folder / name).write_bytes(found[0])

    def soon(self) -> None:
        """Has the thread copy now."""
        self._wake.set()

    def copy(self, pattern: str = "**/*") -> bool:
        """Copies what has changed. A failure is a warning, and is made good by the next copy. Returns success."""
        try:
            for file in sorted(self.folder.glob(pattern)):
                if file.is_file():
                    self._copy(file)
        except Exception as e:  # whatever a network can do
            said = " ".join(str(gcs.explain(self._target, e) or e).split())[:300]
            print(f"WARNING: {file.name} could not be copied to {self._target} ({said})", flush=True)
            return False
        return True

    def _copy(self, file: Path) -> None:
        with self._lock:  # or an older content might come last
            about = file.stat()
            if self._copied.get(file) != (version := (about.st_size, about.st_mtime_ns)):
                (self._target / file.relative_to(self.folder)).write_bytes(file.read_bytes())
                self._copied[file] = version

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(_EVERY)
            self._wake.clear()
            if not self._closed:
                self.copy()

    def close(self) -> None:
        """The last copy. Where it fails, the files stay, and it is said where."""
        self._closed = True
        self._wake.set()
        self._thread.join()
        if self.copy():
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            print(f"WARNING: metrics and events of this run are left in {self.folder}", flush=True)
