"""Clusters of duplicates: documents that are joined by pairs of equal texts, or of similar signatures.

Signatures are divided into bands of rows. Documents that agree in all rows of a band are candidates, and those whose
signatures agree at enough of the 128 positions are joined. A cluster is a connected component, and its lowest document,
by unit and then number, is kept. Units are taken in the order of their numbers, so the result is the same however many
workers made the signature files.

Guaranteed for documents of any number:

- Documents with equal texts, or with equal signatures (and words), are in one cluster.
- In a band, each document is compared with the next 64 documents of its bucket, hence all pairs of a bucket of up to 65
  are. In a larger bucket, up to 32 documents, each time the lowest that is not joined with those before, are compared
  with all others. So a band has at most 96 comparisons for each document, and the work is linear in their number.

Memory: about 110 bytes for each document; the signatures of 512 bytes and the keys of 8 bytes for each band lie in
temporary files.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from flax_mlm.data.cleaning import signatures
from flax_mlm.data.cleaning.signatures import NO_WORDS, PERMUTATIONS
from flax_mlm.data.cleaning.word_hashes import mixed
from flax_mlm.errors import UserError
from flax_mlm.storage.gcs import AnyPath

_RECALL = 0.98  # probability at the threshold that some band agrees
WINDOW = 64  # documents of a bucket that one is compared with
LEADERS = 32  # documents of a large bucket that all others are compared with
_COMPARED = 1 << 13  # pairs at once: 8 MiB of signatures


@dataclasses.dataclass(frozen=True)
class Collection:
    """All documents of the signature files, ordered by unit and number.

    Attributes:
      units, documents: int32 and int64 (N,), the number of each.
      sizes: int64 (N,), bytes of text.
      survivors: int64 (N,), index of the document that is kept in its stead; its own where it is no duplicate.
      is_copy: bool (N,), an earlier document of the cluster has the same text.
      jaccard: float32 (N,), estimated similarity to the survivor; 1 for copies of its text, and for itself.
      hits: (index, file, ngrams), int64 (H, 3): shared n-grams with evaluation files. These documents are compared with
        none, so that no document is dropped as the duplicate of one that is dropped.
      comparisons: number of pairs whose signatures were compared.
    """

    units: np.ndarray
    documents: np.ndarray
    sizes: np.ndarray
    survivors: np.ndarray
    is_copy: np.ndarray
    jaccard: np.ndarray
    hits: np.ndarray
    comparisons: int


def choose_bands(threshold: float) -> tuple[int, int]:
    """Returns bands and rows of a band, at most 128 together, for a threshold of the Jaccard similarity.

    Documents of similarity s agree in some band with a probability of 1 - (1 - s^rows)^bands. Of the divisions with at
    least 98% at the threshold, it is the one with the most rows, which has the fewest candidates: for 0.8 that is 18
    bands of 7 rows.

    Raises:
      UserError: the threshold is no number above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"data.dedup_threshold is {threshold}; expected a number above 0 and at most 1, such as 0.8")
    rows = [r for r in range(1, PERMUTATIONS + 1) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= _RECALL]
    most = max(rows, default=1)
    return PERMUTATIONS // most, most


def least_estimate(threshold: float) -> float:
    """Returns the estimated similarity from which documents are joined: one standard error below the threshold.

    Of documents exactly at the threshold, five of six are joined.
    """
    return threshold - (threshold * (1 - threshold) / PERMUTATIONS) ** 0.5


def merge(unit_files: Mapping[int, AnyPath], threshold: float = 0.8, folder: Path | None = None) -> Collection:
    """Finds the clusters of the documents of signature files, which all were made with the same settings.

    Args:
      unit_files: the signature file of each unit.
      threshold: Jaccard similarity from which documents are near-duplicates.
      folder: for temporary files of 512 + 8 · bands bytes for each document; else that of the system.
    """
    bands, rows = choose_bands(threshold)
    with tempfile.TemporaryDirectory(dir=folder) as name, contextlib.ExitStack() as stack:
        scratch = _Scratch(Path(name), bands, rows, stack)
        table = _read(unit_files, scratch)
        parents = np.arange(len(table.documents))
        free = np.ones(len(parents), bool)  # not contaminated
        free[table.hits[:, 0]] = False
        if table.texts.shape[1]:
            _unite_equal(parents, table.texts, np.flatnonzero(free))
        is_copy = find_roots(parents) != np.arange(len(parents))
        search = _Search(parents, scratch, least_estimate(threshold))
        if scratch.has_signatures:
            search.run(np.flatnonzero(free & ~is_copy))
        survivors = find_roots(parents)
        estimates = _estimates(survivors, is_copy, table.texts, scratch)
    return Collection(
        table.units, table.documents, table.sizes, survivors, is_copy, estimates, table.hits, search.comparisons
    )


def find_roots(parents: np.ndarray) -> np.ndarray:
    """Returns the root of each element, and shortens the paths in `parents` to it."""
    while not np.array_equal(roots := parents[parents], parents):
        parents[:] = roots
    return parents.copy()


def unite(parents: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Joins the sets of pairs of elements. The root of a set is its lowest element, in whatever order pairs come."""
    while len(first):
        first, second = (_roots_of(parents, side) for side in (first, second))
        is_apart = first != second
        low, high = (choose(first[is_apart], second[is_apart]) for choose in (np.minimum, np.maximum))
        np.minimum.at(parents, high, low)
        first, second = low, high


def _roots_of(parents: np.ndarray, elements: np.ndarray) -> np.ndarray:
    found = elements
    while not np.array_equal(above := parents[found], found):
        found = above
    parents[elements] = found
    return found


@dataclasses.dataclass(frozen=True)
class _Table:
    units: np.ndarray
    documents: np.ndarray
    sizes: np.ndarray
    texts: np.ndarray
    hits: np.ndarray


def _read(unit_files: Mapping[int, AnyPath], scratch: "_Scratch") -> _Table:
    """Reads signature files: what is compared goes to temporary files, the rest is returned."""
    parts: list[_Table] = []
    count, width = 0, (0, 0)
    for unit, file in sorted(unit_files.items()):
        for block in signatures.read(file):
            n = len(block.documents)
            if parts and (block.texts.shape[1], block.near.shape[1]) != width:
                raise UserError(f"{file} was made with another data.dedup than the units before; delete it, and retry")
            width = block.texts.shape[1], block.near.shape[1]
            scratch.add(block.near)
            index = np.searchsorted(block.documents, block.hits["document"]) + count
            hits = np.stack([index, block.hits["file"], block.hits["ngrams"]], axis=1)
            parts.append(_Table(np.full(n, unit, np.int32), block.documents, block.sizes, block.texts, hits))
            count += n
    scratch.finish()
    if not parts:
        empty = np.zeros(0, np.int64)
        return _Table(empty, empty, empty, empty.reshape(0, 0).astype(np.uint64), empty.reshape(0, 3))
    columns = (field.name for field in dataclasses.fields(_Table))
    return _Table(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))


def _unite_equal(parents: np.ndarray, keys: np.ndarray, members: np.ndarray) -> None:
    """Joins the members whose rows of keys, (N, K), are equal."""
    keys = keys[members]
    order = np.lexsort(keys.T[::-1])
    keys, members = keys[order], members[order]
    is_equal = (keys[1:] == keys[:-1]).all(1)
    unite(parents, members[:-1][is_equal], members[1:][is_equal])


class _Scratch:
    """Signatures and band keys of all documents, in temporary files.

    Attributes:
      has_signatures: they are there; else only texts are compared.
    """

    def __init__(self, folder: Path, bands: int, rows: int, stack: contextlib.ExitStack):
        self._bands, self._rows = bands, rows
        self._paths = [folder / name for name in ("near", "all", *map(str, range(bands)))]
        self._files = [stack.enter_context(path.open("wb")) for path in self._paths]
        self.has_signatures = False

    def add(self, near: np.ndarray) -> None:
        if near.shape[1]:
            self.has_signatures = True
            near.tofile(self._files[0])
            _keys(near).tofile(self._files[1])
            for band, file in enumerate(self._files[2:]):
                _keys(near[:, band * self._rows : (band + 1) * self._rows]).tofile(file)

    def finish(self) -> None:
        for file in self._files:
            file.close()
        if self.has_signatures:
            self.near = np.memmap(self._paths[0], np.uint32, "r").reshape(-1, PERMUTATIONS)

    def whole(self) -> np.ndarray:
        """Returns a key of whole signatures, uint64 (N,)."""
        return np.fromfile(self._paths[1], np.uint64)

    def bands(self) -> Iterator[np.ndarray]:
        """Yields the keys of each band, uint64 (N,)."""
        for path in self._paths[2:]:
            yield np.fromfile(path, np.uint64)


def _keys(rows: np.ndarray) -> np.ndarray:
    """Returns a hash of each row of values, uint64 (N,)."""
    keys = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        keys = mixed(keys + column + np.uint64(1))
    return keys


class _Search:
    """The search for similar signatures.

    Attributes:
      comparisons: number of pairs whose signatures were compared so far.
    """

    def __init__(self, parents: np.ndarray, scratch: _Scratch, least: float):
        self._parents, self._scratch, self._least = parents, scratch, least
        self.comparisons = 0

    def run(self, members: np.ndarray) -> None:
        """Joins similar documents among the members, int64 (M,) in ascending order."""
        members = members[~_are_empty(self._scratch.near, members)]
        _unite_equal(self._parents, self._scratch.whole()[:, None], members)
        members = members[self._parents[members] == members]  # one for each signature
        for keys in self._scratch.bands():
            keys = keys[members]
            order = np.argsort(keys, kind="stable")
            keys, inside = keys[order], members[order]
            self._compare_next(keys, inside)
            self._compare_leaders(keys, inside)

    def _compare_next(self, keys: np.ndarray, members: np.ndarray) -> None:
        """Compares each member with the next ones of its bucket."""
        at = np.arange(len(members))
        for distance in range(1, WINDOW + 1):
            at = at[: np.searchsorted(at, len(members) - distance)]
            at = at[keys[at] == keys[at + distance]]
            if not len(at):
                return
            self._compare(members[at], members[at + distance])

    def _compare_leaders(self, keys: np.ndarray, members: np.ndarray) -> None:
        """Compares some members of each large bucket with all others."""
        bounds = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]]))
        for bucket in np.flatnonzero(np.diff(bounds) > WINDOW + 1):
            rest = members[bounds[bucket] : bounds[bucket + 1]]
            for _ in range(LEADERS):
                self._compare(np.full(len(rest) - 1, rest[0]), rest[1:])
                roots = _roots_of(self._parents, rest)
                rest = rest[roots != roots[0]]
                if not len(rest):
                    break

    def _compare(self, first: np.ndarray, second: np.ndarray) -> None:
        """Joins the pairs that are similar enough; pairs that are joined already are not compared."""
        is_apart = _roots_of(self._parents, first) != _roots_of(self._parents, second)
        first, second = first[is_apart], second[is_apart]
        near = self._scratch.near
        self.comparisons += len(first)
        for i in range(0, len(first), _COMPARED):
            a, b = first[i : i + _COMPARED], second[i : i + _COMPARED]
            is_similar = signatures.jaccard(near[a], near[b]) >= self._least
            unite(self._parents, a[is_similar], b[is_similar])


def _are_empty(near: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Returns bool (M,), which documents have no words."""
    parts = (near[members[i : i + _COMPARED]] for i in range(0, len(members), _COMPARED))
    return np.concatenate([np.zeros(0, bool), *((part == NO_WORDS).all(1) for part in parts)])


def _estimates(survivors: np.ndarray, is_copy: np.ndarray, texts: np.ndarray, scratch: _Scratch) -> np.ndarray:
    """Returns the similarity of each document to its survivor, float32 (N,)."""
    estimates = np.ones(len(survivors), np.float32)
    if scratch.has_signatures:
        others = np.flatnonzero((texts != texts[survivors]).any(1))
        for i in range(0, len(others), _COMPARED):
            some = others[i : i + _COMPARED]
            estimates[some] = signatures.jaccard(scratch.near[some], scratch.near[survivors[some]])
    return estimates
