"""Cleaning a source before it is packed: a pass over its units, one merge, and the source without what is dropped.

The pass leaves a signature file for each unit in the folder of unfinished work, so that it can be shared out and
continued like the making of units. The merge writes the list of dropped documents there.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flax_mlm.config.schema import DataConfig, split_paths
from flax_mlm.data.cleaning import clusters, signatures
from flax_mlm.data.cleaning.contamination import Evaluation, read_evaluation
from flax_mlm.data.cleaning.dropped import Dropped, read_heads
from flax_mlm.data.cleaning.word_hashes import documents_of
from flax_mlm.data.sources.base import Source, Unit
from flax_mlm.data.work import Log, Work
from flax_mlm.errors import UserError
from flax_mlm.storage import buckets, files
from flax_mlm.storage.gcs import AnyPath

REPORT, LIST = "cleaning.json", "dropped.npy"  # in the folder of the corpus


@dataclasses.dataclass(frozen=True)
class Cleaning:
    """Settings of the pass; it can be sent to other processes.

    Attributes:
      dedup: none, exact or near.
      threshold: Jaccard similarity from which documents are near-duplicates.
      evaluation: texts that documents must not share n-grams with.
    """

    dedup: str
    threshold: float
    evaluation: Evaluation | None

    @classmethod
    def from_config(cls, data: DataConfig) -> "Cleaning | None":
        """Returns the settings of a config; None: nothing is to be cleaned.

        Raises:
          UserError: `data.decontaminate` is no list of globs, or an evaluation file cannot be read.
        """
        patterns = split_paths(data.decontaminate, os.path.exists) if data.decontaminate else []
        if not all(patterns):
            what = f"data.decontaminate is '{data.decontaminate}'; a glob beside a comma is empty"
            raise UserError(f"{what}; expected globs of files with commas between them")
        if data.dedup == "none" and not patterns:
            return None
        return cls(data.dedup, data.dedup_threshold, read_evaluation(patterns) if patterns else None)

    @property
    def version(self) -> Any:
        """All that decides what is dropped, JSON-able."""
        near = self.threshold if self.dedup == "near" else None
        return [self.dedup, near, self.evaluation.digest if self.evaluation else None]

    def record(self, unit: Unit, work: Work) -> None:
        """Writes the signature file of a unit."""
        signatures.write(_file(work, unit.number), documents_of(unit.chunks()), self.dedup, self.evaluation)

    def unrecorded(self, units: Iterable[Unit], work: Work) -> list[Unit]:
        """Returns the units without a signature file."""
        names = {*files.names(work.folder / "signatures")}
        return [unit for unit in units if _file(work, unit.number).name not in names]

    def apply(self, source: Source, work: Work, log: Log) -> Source:
        """Returns a source without what is to be dropped. All its units have signature files."""
        if not files.exists(work.folder / LIST):
            log(f"cleaning: comparing the documents of {len(source.units):,} units")
            unit_files = {unit.number: _file(work, unit.number) for unit in source.units}
            scratch = None if buckets.is_one(work.folder) else Path(work.folder)
            collection = clusters.merge(unit_files, self.threshold, scratch)
            Dropped.from_collection(collection).write(work.folder / LIST)
        dropped = Dropped.read(work.folder / LIST)
        units = (dataclasses.replace(unit, dropped=_numbers(dropped, unit)) for unit in source.units)
        return dataclasses.replace(source, units=tuple(units))

    def report(self, source: Source, work: Work, tokens_per_byte: float) -> dict[str, Any]:
        """Returns what was dropped and why, JSON-able.

        Args:
          source: with all its documents.
          tokens_per_byte: of what was kept, from which the tokens saved are estimated.
        """
        dropped = Dropped.read(work.folder / LIST)
        wanted = [member[:2] for cluster in dropped.sample() for member in cluster]
        heads: dict[tuple[int, int], str] = {}
        for number in sorted({unit for unit, _ in wanted}):
            heads |= read_heads(number, documents_of(source.units[number].chunks()), wanted)
        found = dropped.report(heads, self.evaluation)
        return found | {"tokens_saved": round(tokens_per_byte * sum(found["bytes_dropped"].values()))}

    def keep(self, report: dict[str, Any], work: Work) -> None:
        """Writes the report and the list of what is dropped into the folder of the corpus."""
        work.write(work.corpus / REPORT, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
        work.write(work.corpus / LIST, files.read_bytes(work.folder / LIST))


def log_report(report: dict[str, Any], log: Log) -> None:
    """Logs how many documents were dropped and why, and evaluation files that cannot be compared."""
    total, dropped = report["documents"], report["documents_dropped"]
    reasons = {"exact": "copies", "near": "near-duplicates", "contaminated": "with text of evaluation files"}
    each = ", ".join(f"{dropped[reason]:,} {name}" for reason, name in reasons.items())
    saved = f"about {report['tokens_saved']:,} tokens saved"
    log(f"cleaning: {report['documents_kept']:,} of {total:,} documents are kept; dropped: {each}; {saved}")
    for file in report["decontamination"]:
        short = f"; {file['texts_too_short']:,} are too short to compare" if file["texts_too_short"] else ""
        texts = f"{file['file']} ({file['texts']:,} texts{short})"
        log(f"cleaning: {file['documents_dropped']:,} documents share text with {texts}")


def _numbers(dropped: Dropped, unit: Unit) -> frozenset[int]:
    return frozenset(dropped.in_unit(unit.number).tolist())


def _file(work: Work, unit: int) -> AnyPath:
    return work.folder / "signatures" / f"{unit:05d}"
