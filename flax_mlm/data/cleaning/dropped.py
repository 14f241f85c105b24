"""The list of the documents that are left out of a corpus, as a file, and a report about it."""

import dataclasses
import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flax_mlm.data.cleaning.clusters import Collection
from flax_mlm.data.cleaning.contamination import Evaluation
from flax_mlm.data.cleaning.word_hashes import Documents, mixed
from flax_mlm.errors import UserError
from flax_mlm.storage import files
from flax_mlm.storage.gcs import AnyPath

# Why a document is dropped: `REASONS[reason]`.
REASONS = ("exact", "near", "contaminated")
EXACT, NEAR, CONTAMINATED = range(3)
# A dropped document, and the one that is kept in its stead; -1 for contaminated ones.
DROPPED_DTYPE = np.dtype(
    [
        ("unit", "<i4"),
        ("document", "<i8"),
        ("reason", "u1"),
        ("survivor_unit", "<i4"),
        ("survivor", "<i8"),
        ("jaccard", "<f4"),
        ("bytes", "<i8"),
    ]
)
# An n-gram shared with an evaluation file, by its number.
CONTAMINATED_DTYPE = np.dtype([("unit", "<i4"), ("document", "<i8"), ("file", "<i4"), ("ngrams", "<i8")])

_SAMPLES = 10  # clusters in the report
_MEMBERS = 5  # of a cluster in the report, its survivor included
_HEAD_CHARS = 200
_NAMED = 1000  # documents that the report names for an evaluation file


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Documents that are left out of a corpus.

    Attributes:
      documents: DROPPED_DTYPE, ordered by unit and document.
      contaminated: CONTAMINATED_DTYPE, in the same order, one for each document and evaluation file that share text.
      totals: int64 (2,), documents and bytes of the whole source.
    """

    documents: np.ndarray
    contaminated: np.ndarray
    totals: np.ndarray

    @classmethod
    def from_collection(cls, collection: Collection) -> "Dropped":
        """Returns what to drop from a collection: duplicates, and documents that share text with evaluation files."""
        index = np.arange(len(collection.documents))
        is_hit = np.zeros(len(index), bool)
        is_hit[collection.hits[:, 0]] = True
        at = np.flatnonzero(is_hit | (collection.survivors != index))
        survivors, hit = collection.survivors[at], is_hit[at]
        documents = np.zeros(len(at), DROPPED_DTYPE)
        documents["unit"], documents["document"] = collection.units[at], collection.documents[at]
        documents["reason"] = np.where(hit, CONTAMINATED, np.where(collection.is_copy[at], EXACT, NEAR))
        documents["survivor_unit"] = np.where(hit, -1, collection.units[survivors])
        documents["survivor"] = np.where(hit, -1, collection.documents[survivors])
        documents["jaccard"] = np.where(hit, 0, collection.jaccard[at])
        documents["bytes"] = collection.sizes[at]
        contaminated = np.zeros(len(collection.hits), CONTAMINATED_DTYPE)
        where, contaminated["file"], contaminated["ngrams"] = collection.hits.T
        contaminated["unit"], contaminated["document"] = collection.units[where], collection.documents[where]
        return cls(documents, contaminated, np.array([len(index), collection.sizes.sum()], np.int64))

    def write(self, file: AnyPath) -> None:
        """Writes the file, which is there whole or not at all. Equal lists give equal bytes."""
        content = io.BytesIO()
        for array in vars(self).values():
            np.lib.format.write_array(content, array, allow_pickle=False)
        files.write_bytes(file, content.getvalue())

    @classmethod
    def read(cls, file: AnyPath) -> "Dropped":
        """Reads the file. Raises UserError: it is damaged."""
        content = io.BytesIO(files.read_bytes(file))
        try:
            return cls(*(np.lib.format.read_array(content, allow_pickle=False) for _ in dataclasses.fields(cls)))
        except ValueError as e:
            raise UserError(f"{file} is damaged: {e}; delete it, and start the same command again") from e

    def in_unit(self, unit: int) -> np.ndarray:
        """Returns the numbers of the documents of a unit that are dropped, int64, in ascending order."""
        first, last = np.searchsorted(self.documents["unit"], [unit, unit + 1])
        return self.documents["document"][first:last]

    def sample(self) -> list[list[tuple[int, int, float]]]:
        """Returns up to ten clusters for people to look at, those with near-duplicates first.

        Returns:
          for each cluster the survivor and up to four others, as (unit, document, similarity to the survivor).
        """
        rows = self.documents[self.documents["reason"] != CONTAMINATED]
        survivors = rows[["survivor_unit", "survivor"]].copy()
        names, cluster = np.unique(survivors, return_inverse=True)
        has_near = np.zeros(len(names), bool)
        has_near[cluster[rows["reason"] == NEAR]] = True
        number = names["survivor"].astype(np.uint64) + (names["survivor_unit"].astype(np.uint64) << np.uint64(32))
        chosen = np.lexsort([mixed(number), ~has_near])[:_SAMPLES]
        found = []
        for i in chosen:
            members = rows[cluster == i]
            members = members[np.argsort(members["reason"] != NEAR, kind="stable")][: _MEMBERS - 1]
            survivor = (*names[i].tolist(), 1.0)
            found.append([survivor, *members[["unit", "document", "jaccard"]].tolist()])
        return found

    def report(
        self, heads: Mapping[tuple[int, int], str] | None = None, evaluation: Evaluation | None = None
    ) -> dict[str, Any]:
        """Returns the report, JSON-able. `tokens_saved` is None, for the caller to fill.

        Args:
          heads: beginnings of the documents of `sample`, by (unit, document); see `read_heads`.
          evaluation: the evaluation files that the documents were compared with.
        """
        rows, total = self.documents, self.totals.tolist()
        counts = {name: int((rows["reason"] == i).sum()) for i, name in enumerate(REASONS)}
        dropped_bytes = {name: int(rows["bytes"][rows["reason"] == i].sum()) for i, name in enumerate(REASONS)}
        return {
            "documents": total[0],
            "documents_kept": total[0] - len(rows),
            "documents_dropped": counts,
            "bytes": total[1],
            "bytes_dropped": dropped_bytes,
            "tokens_saved": None,
            "sample_clusters": [self._cluster(members, heads or {}) for members in self.sample()],
            "decontamination": self._by_file(evaluation) if evaluation else [],
        }

    def _cluster(self, members: list[tuple[int, int, float]], heads: Mapping[tuple[int, int], str]) -> dict[str, Any]:
        rows = self.documents
        unit, survivor, _ = members[0]
        is_member = (rows["survivor_unit"] == unit) & (rows["survivor"] == survivor)
        shown = [
            {"unit": unit, "document": document, "jaccard": round(jaccard, 3), "text": heads.get((unit, document))}
            for unit, document, jaccard in members
        ]
        return {"documents": 1 + int(is_member.sum()), "members": shown}

    def _by_file(self, evaluation: Evaluation) -> list[dict[str, Any]]:
        found = []
        for number, name in enumerate(evaluation.files):
            hits = self.contaminated[self.contaminated["file"] == number]
            found.append(
                {
                    "file": name,
                    "texts": evaluation.texts[number],
                    "texts_too_short": evaluation.short_texts[number],
                    "documents_dropped": len(hits),
                    "documents": [list(hit) for hit in hits[["unit", "document"]][:_NAMED].tolist()],
                }
            )
        return found


def read_heads(unit: int, documents: Documents, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """Reads the first 200 characters of the wanted documents, (unit, document), of one unit."""
    numbers = {document for where, document in wanted if where == unit}
    heads: dict[tuple[int, int], str] = {}
    for number, chunks in documents:
        if number in numbers:
            head = ""
            for chunk in chunks:
                head = head or chunk.lstrip()[:_HEAD_CHARS]
            heads[unit, number] = head
        if len(heads) == len(numbers):
            break
    return heads
