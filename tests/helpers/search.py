"""A benchmark of search whose scores are whole numbers, so that every program ranks by the same scores."""

import numpy as np

from flax_mlm.evaluation.retrieval import Benchmark


def search_of_integers(seed: int) -> tuple[Benchmark, dict[str, np.ndarray]]:
    """300 documents, 20 of which are queries too, with their vectors. Many scores tie, some judged ones are absent."""
    rng = np.random.default_rng(seed)
    vectors = {f"d{i}": rng.integers(-2, 3, 4).astype(np.float32) for i in range(300)}
    relevance = {}
    for i in range(20):
        query = f"d{i}"
        near = sorted(vectors, key=lambda name: -vectors[name] @ vectors[query])[:40]
        chosen = [*rng.choice(near, 5, replace=False), *rng.choice(list(vectors), 2), query, f"absent{i}"]
        relevance[query] = {str(name): int(rng.integers(-1, 4)) for name in chosen} | {near[7]: 2}
    texts = {name: name for name in vectors}
    return Benchmark(texts, {query: query for query in relevance}, relevance), vectors
