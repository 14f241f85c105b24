"""datatrove's signatures: MinHash of 128 permutations, word 5-grams."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig

from benchmarks.workers.serving import serve


def build(spec: dict[str, Any]) -> Callable[[], float]:
    """spec: `folder` with documents.json, a list of texts."""
    folder = Path(spec["folder"])
    texts = json.loads((folder / "documents.json").read_text())
    documents = [Document(text, str(number)) for number, text in enumerate(texts)]
    config = MinhashConfig(n_grams=5, num_buckets=16, hashes_per_bucket=8, hash_config=HashConfig(precision=32))

    def step() -> float:
        """Files of signatures, one for each band: seconds of processor time."""
        start = time.process_time()
        MinhashDedupSignature(str(folder / "datatrove"), config).run(iter(documents))
        return time.process_time() - start

    return step


if __name__ == "__main__":
    serve(build, ("datatrove", "numpy"))
