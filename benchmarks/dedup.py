"""Which planted near-duplicates deduplication finds, and how fast it is beside datatrove's MinHash.

    bash benchmarks/setup.sh
    python -m benchmarks.dedup --config.data.source='text:wiki.txt.gz' --json=dedup.json > dedup.md

Truth is the Jaccard similarity of all pairs of documents, computed from their sets of word 5-grams: the documents that
should be dropped are all but the lowest of each cluster of pairs at or above `--threshold`. A planted document is a
copy of one of the source with some words exchanged. Programs take turns (benchmarks/turns.py), each in one process.
"""

import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import (
    planted,
    turns,  # first, for the environment as it was
)
from flax_mlm.cli import app, tables
from flax_mlm.config.schema import Config
from flax_mlm.errors import UserError
from flax_mlm.storage import files

_ROUNDS = flags.DEFINE_integer("rounds", 7, "turns of each program", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 3.0, "of a turn, about; at least one step")
_DOCUMENTS = flags.DEFINE_integer("documents", 5000, "of the source, from its start", lower_bound=2)
_PLANTED = flags.DEFINE_integer("planted", 500, "near-duplicates of each similarity", lower_bound=1)
_SIMILARITIES = flags.DEFINE_list("similarities", ["0.95", "0.9", "0.85", "0.8", "0.75", "0.7", "0.5"], "planted")
_MEGABYTES = flags.DEFINE_float("megabytes", 4.0, "of text that signatures are made of in a step, at most", 0.0)
_THRESHOLD = flags.DEFINE_float("threshold", 0.8, "Jaccard similarity from which documents are duplicates")
_JSON = flags.DEFINE_string("json", "", "file for all that was measured")

_WORDS = (150, 5000)  # of documents that get a planted near-duplicate


def documents_of(config: Config) -> list[str]:
    """The texts of the first documents of the source."""
    from flax_mlm.data.sources.open import open_source

    chunks = open_source(config.data.source).chunks()
    groups = itertools.groupby(chunks, lambda chunk: chunk[:2])
    return ["".join(chunk.text for chunk in group) for _, group in itertools.islice(groups, _DOCUMENTS.value)]


def survivors_of(folder: Path, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    """For each document the number of the one that is kept, and how many signatures were compared."""
    from flax_mlm.data.cleaning import clusters, signatures

    signatures.write(folder / "unit", ((number, [text]) for number, text in enumerate(texts)), "near")
    found = clusters.merge({0: folder / "unit"}, _THRESHOLD.value)
    return found.survivors, found.comparisons


def true_survivors(count: int, pairs: Mapping[tuple[int, int], float]) -> np.ndarray:
    """The same by all pairs."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = np.array(list(pairs), int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    lowest = np.full(count, count)
    np.minimum.at(lowest, labels, np.arange(count))
    return lowest[labels]


def quality(texts: list[str], folder: Path) -> dict[str, dict[str, float]]:
    """What is found of the near-duplicates of each similarity."""
    rng = random.Random(0)
    words = [planted.words(text) for text in texts]
    sets: list[Set[tuple[str, ...]]] = [planted.ngrams(w) for w in words]
    able = [i for i, w in enumerate(words) if _WORDS[0] <= len(w) <= _WORDS[1]]
    if not able:
        raise UserError(f"data.source: no document has {_WORDS[0]} to {_WORDS[1]} words; take another source")
    found = {}
    for similarity in map(float, _SIMILARITIES.value):
        originals = sorted(rng.sample(able, min(len(able), _PLANTED.value)))
        variants = [planted.variant(texts[i], similarity, rng) for i in originals]
        all_sets = sets + [planted.ngrams(planted.words(text)) for text, _ in variants]
        pairs = planted.all_pairs(all_sets, 0.3)
        alike = {pair: value for pair, value in pairs.items() if value >= _THRESHOLD.value}
        truth = true_survivors(len(all_sets), alike)
        survivors, comparisons = survivors_of(folder, texts + [text for text, _ in variants])
        index = np.arange(len(all_sets))
        dropped, due = survivors != index, truth != index
        nearest = np.zeros(len(index))  # similarity to the nearest document of the cluster that was found
        for pair, value in pairs.items():
            if survivors[pair[0]] == survivors[pair[1]]:
                nearest[list(pair)] = np.maximum(nearest[list(pair)], value)
        copies = index[len(texts) :]
        found[str(similarity)] = {
            "planted": len(variants),
            "mean_similarity": float(np.mean([reached for _, reached in variants])),
            "joined": float(np.mean(survivors[copies] == survivors[originals])),
            "due": int(due.sum()),
            "dropped": int(dropped.sum()),
            "recall": float((dropped & due).sum() / max(due.sum(), 1)),
            "precision": float((dropped & due).sum() / max(dropped.sum(), 1)),
            "least_similarity": float(nearest[dropped].min(initial=1)),
            "comparisons": comparisons,
        }
        turns.say(f"  similarity {similarity} is measured")
    return found


def speed(texts: list[str], folder: Path) -> dict[str, Any]:
    """Megabytes of text that each program makes signatures of, per second of processor time and by the clock."""
    ends = np.cumsum([len(text.encode()) for text in texts]) / 1e6
    count = max(1, int(np.searchsorted(ends, _MEGABYTES.value, side="right")))
    size = float(ends[count - 1])
    (folder / "documents.json").write_text(json.dumps(texts[:count]))
    spec = {"folder": str(folder)}
    with turns.Workers() as workers:
        workers.start("ours", "ours_signatures", spec)
        workers.start("datatrove", "datatrove_signatures", spec, "datatrove")
        workers.take_turns(_ROUNDS.value, _SECONDS.value)
        programs = {name: worker.summary() for name, worker in workers.ready.items()}
        return {
            "megabytes": size,
            "rates": {name: size / _processor_seconds(worker) for name, worker in workers.ready.items()},
            "rates_by_the_clock": {name: size / worker.median() for name, worker in workers.ready.items()},
            "programs": programs,
            "refused": workers.refused,
            "discarded": workers.discarded,
        }


def _processor_seconds(worker: turns.Worker) -> float:
    return statistics.median(seconds for turn in worker.kept for seconds in turn.results)


def main(config: Config) -> None:
    texts = documents_of(config)
    with tempfile.TemporaryDirectory() as name:
        found = quality(texts, Path(name))
        measured = speed(texts, Path(name))
    rows = [
        [
            similarity,
            f"{f['planted']:,.0f}",
            f"{f['mean_similarity']:.3f}",
            f"{f['joined']:.1%}",
            f"{f['due']:,.0f}",
            f"{f['dropped']:,.0f}",
            f"{f['recall']:.1%}",
            f"{f['precision']:.1%}",
            f"{f['least_similarity']:.2f}",
            f"{f['comparisons']:,.0f}",
        ]
        for similarity, f in found.items()
    ]
    header = ("planted at", "planted", "mean", "joined with its original", "duplicates", "dropped")
    print(tables.markdown((*header, "recall", "precision", "least similar dropped", "comparisons"), rows))
    print(f"\n{len(texts):,} documents of {config.data.source}, and the planted ones; threshold {_THRESHOLD.value}.\n")
    rates, by_the_clock = measured["rates"], measured["rates_by_the_clock"]
    peaks = {name: program["peak_bytes"] / 2**20 for name, program in measured["programs"].items()}
    table = [[n, f"{r:.2f}", f"{by_the_clock[n]:.2f}", f"{peaks[n]:,.0f}"] for n, r in rates.items()]
    print(tables.markdown(("signatures", "MB per second of a core", "MB/s by the clock", "peak MiB"), table) + "\n")
    if "datatrove" in rates:
        print(f"Ours is {rates['ours'] / rates['datatrove']:.1f} times as fast.")
    for why in measured["refused"].values():
        print(f"Left out: {why}.")
    print(f"{measured['megabytes']:.1f} MB, one process each. {measured['discarded']}; {turns.machine()}.")
    if _JSON.value:
        record = {"machine": turns.machine(), "source": config.data.source, "threshold": _THRESHOLD.value}
        files.write_json(Path(_JSON.value), record | {"quality": found, "speed": measured})


if __name__ == "__main__":
    app.run(main)
