"""Our signatures: MinHash of 128 permutations, and hashes of the text."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.workers.serving import serve
from flax_mlm.data.cleaning import signatures


def build(spec: dict[str, Any]) -> Callable[[], float]:
    """spec: `folder` with documents.json, a list of texts."""
    folder = Path(spec["folder"])
    documents = [(number, [text]) for number, text in enumerate(json.loads((folder / "documents.json").read_text()))]

    def step() -> float:
        """One file of signatures: seconds of processor time."""
        start = time.process_time()
        signatures.write(folder / "ours", documents, "near")
        return time.process_time() - start

    return step


if __name__ == "__main__":
    serve(build, ("numpy",))
