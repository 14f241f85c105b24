"""The corpora that a run is trained and evaluated on, one or several, and how much of each."""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from etils import epath

from flax_mlm.config.schema import DataConfig
from flax_mlm.data.corpus import SPLITS, Corpus, Rows
from flax_mlm.data.stream import Stream, counts, whole_numbers
from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.errors import UserError
from flax_mlm.storage import gcs


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Corpora of the same tokenizer and row length. Of one alone everything is as that corpus has it.

    Attributes:
      corpora: By name: the folder's, with as many of those above it as tell two apart.
      weights: Of each corpus, in proportion to the training rows that are taken from it.
    """

    corpora: dict[str, Corpus]
    weights: tuple[int, ...] = (1,)

    @classmethod
    def open(cls, data: DataConfig) -> "Mixture":
        """Opens the folders that `data.corpus` names.

        Raises:
          UserError: as `Corpus.open`; two are the same folder, or differ in tokenizer or row length.
        """
        folders = data.folders()
        opened = [Corpus.open(folder) for folder in folders]
        first, where = opened[0], [_resolved(corpus.path) for corpus in opened]
        for i, corpus in enumerate(opened):
            if where[i] in where[:i]:
                raise UserError(
                    f"data.corpus: {opened[where.index(where[i])].path} and {corpus.path} are the same folder; name it "
                    "once, with the sum of the weights"
                )
            if corpus.manifest["tokenizer"]["sha256"] != first.manifest["tokenizer"]["sha256"]:
                raise UserError(
                    f"data.corpus: {first.path} and {corpus.path} were made with different tokenizers; prepare the "
                    f"second with --config.tokenizer.path={first.path / first.manifest['tokenizer']['file']}"
                )
            if corpus.seq_len != first.seq_len:
                raise UserError(
                    f"data.corpus: {first.path} has rows of {first.seq_len} tokens, and {corpus.path} of "
                    f"{corpus.seq_len}; prepare one of them again with the data.seq_len of the other"
                )
        shares = [
            Fraction(weight) if weight else Fraction(corpus.counts["train"]["rows"])
            for weight, corpus in zip(folders.values(), opened, strict=True)
        ]
        return cls(dict(zip(_names(where), opened, strict=True)), whole_numbers(shares) if len(shares) > 1 else (1,))

    def __str__(self) -> str:
        """As `data.corpus` takes it."""
        if len(self.corpora) == 1:
            return str(self._first.path)
        parts = zip(self.corpora.values(), self.weights, strict=True)
        return ",".join(f"{corpus.path}:{weight}" for corpus, weight in parts)

    @property
    def _first(self) -> Corpus:
        return next(iter(self.corpora.values()))

    @property
    def seq_len(self) -> int:
        """L."""
        return self._first.seq_len

    @property
    def vocab_size(self) -> int:
        """V of the tokenizer."""
        return self._first.vocab_size

    @property
    def shares(self) -> dict[str, float]:
        """The part of the training rows that is taken from each corpus."""
        return {name: w / sum(self.weights) for name, w in zip(self.corpora, self.weights, strict=True)}

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """As `Corpus.counts`, of all corpora together."""
        return {split: _sums([corpus.counts[split] for corpus in self.corpora.values()]) for split in SPLITS}

    @property
    def tokens_per_row(self) -> float:
        """Of the training rows that are taken, without special ones."""
        train = [corpus.counts["train"] for corpus in self.corpora.values()]
        return sum(w * c["tokens"] / c["rows"] for w, c in zip(self.shares.values(), train, strict=True))

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides what is read: the same rows in the same proportion have the same one."""
        each = [corpus.fingerprint for corpus in self.corpora.values()]
        return each[0] if len(each) == 1 else hashlib.sha256(json.dumps([each, self.weights]).encode()).hexdigest()

    @property
    def about(self) -> dict[str, Any]:
        """What text it is, and how much of it is there to train on; of several corpora also of each, with its share."""
        each = {name: corpus.about for name, corpus in self.corpora.items()}
        if len(each) == 1:
            return self._first.about
        texts = _texts(list(each.values()))
        numbers = _sums([{key: n for key, n in a.items() if key not in texts} for a in each.values()])
        return {**texts, **numbers, "corpora": {name: {**a, "share": self.shares[name]} for name, a in each.items()}}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all. Raises UserError, as that of a corpus."""
        return self._first.tokenizer()

    def split(self, name: str) -> Rows:
        """The rows of "train" or "validation" of all corpora, one corpus after another."""
        return Rows.joined([corpus.split(name) for corpus in self.corpora.values()])

    def stream(self) -> Stream:
        """In which order the corpora give their training rows."""
        return Stream(tuple(corpus.counts["train"]["rows"] for corpus in self.corpora.values()), self.weights)

    def held_out(self, max_rows: int) -> list[np.ndarray]:
        """Numbers, in the split "validation", of the rows to evaluate on, of each corpus: all, or when `max_rows` is
        positive only so many, each corpus having its share (or all its rows, if they are fewer), spread evenly."""
        rows = [corpus.counts["validation"]["rows"] for corpus in self.corpora.values()]
        wanted = counts(self.weights, max_rows) if max_rows else rows
        starts = itertools.accumulate(rows, initial=0)
        return [start + _spread(n, min(m, n)) for start, n, m in zip(starts, rows, wanted, strict=False)]


def about_of(corpora: Sequence[Mixture]) -> dict[str, Any]:
    """`Mixture.about` of what the phases of a run are trained on: the numbers of the first, and what text all are."""
    each = [corpus.about for corpus in corpora]
    return each[0] | _texts(each)


def fingerprint_of(corpora: Sequence[Mixture]) -> str:
    """`Mixture.fingerprint` of what the phases of a run are trained on."""
    each = [corpus.fingerprint for corpus in corpora]
    return each[0] if len(set(each)) == 1 else hashlib.sha256(json.dumps(each).encode()).hexdigest()


def _texts(about: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Name and licence of several texts, each said once."""
    return {key: "; ".join(dict.fromkeys(a[key] for a in about)) for key in ("name", "licence")}


def _sums(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {key: sum(c[key] for c in counts) for key in counts[0]}


def _spread(num_rows: int, wanted: int) -> np.ndarray:
    return np.arange(wanted) * num_rows // max(wanted, 1)


def _resolved(path: epath.Path) -> str:
    return os.fspath(path).rstrip("/") if gcs.is_one(path) else os.path.realpath(path)


def _names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths that differ, as many as it takes to tell them apart."""
    for length in itertools.count(1):
        names = ["/".join(path.split("/")[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError
