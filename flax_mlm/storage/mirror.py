"""Growing files in a bucket, which has no appending: they are written to a local folder and copied whole."""

import shutil
import tempfile
import threading
from pathlib import Path

from etils import epath

from flax_mlm.storage import gcs

_INTERVAL = 60.0  # seconds between copies


class Mirror:
    """A temporary folder whose changed files a thread copies to a bucket, once a minute and on request.

    Attributes:
      folder: the folder to write to.
    """

    def __init__(self, target: epath.Path):
        self.folder = Path(tempfile.mkdtemp(prefix="flax_mlm-"))
        self._target, self._copied = target, dict[Path, tuple[int, int]]()
        self._lock, self._wake, self._closed = threading.Lock(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def fetch(self, name: str) -> None:
        """Copies a file from the bucket to the folder if it exists. Raises the errors of `gcs.errors`."""
        if (content := gcs.read(self._target / name)[0]) is not None:
            (self.folder / name).write_bytes(content)

    def soon(self) -> None:
        """Requests a copy from the thread now."""
        self._wake.set()

    def copy(self, pattern: str = "**/*") -> bool:
        """Copies the changed files. Returns False, with a warning, if one fails; the next copy tries again."""
        try:
            for file in sorted(self.folder.glob(pattern)):
                if file.is_file():
                    self._copy(file)
        except Exception as e:  # any network error
            why = " ".join(str(gcs.explain(self._target, e) or e).split())[:300]
            print(f"WARNING: {file.name} could not be copied to {self._target} ({why})", flush=True)
            return False
        return True

    def _copy(self, file: Path) -> None:
        with self._lock:  # otherwise an older content could be written last
            status = file.stat()
            if self._copied.get(file) != (version := (status.st_size, status.st_mtime_ns)):
                (self._target / file.relative_to(self.folder)).write_bytes(file.read_bytes())
                self._copied[file] = version

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(_INTERVAL)
            self._wake.clear()
            if not self._closed:
                self.copy()

    def close(self) -> None:
        """Copies for the last time. If that fails, the local files are kept, and a warning names their folder."""
        self._closed = True
        self._wake.set()
        self._thread.join()
        if self.copy():
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            print(f"WARNING: metrics and events of this run are kept in {self.folder}", flush=True)
