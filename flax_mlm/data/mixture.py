"""Corpora that a run is trained and evaluated on, with their weights, and the cursor that remembers what was read."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from flax_mlm.config import phases
from flax_mlm.config.schema import Config, DataConfig
from flax_mlm.data import words
from flax_mlm.data.corpus import Corpus, Rows
from flax_mlm.data.corpus_folders import corpus_folders
from flax_mlm.data.prepare import prepare
from flax_mlm.data.stream import Stream, counts, power_weights, whole_numbers
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.errors import UserError
from flax_mlm.storage import buckets, files

_SAMPLE_ROWS = 64  # to guess the scripts of a text from


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Corpora with the same tokenizer and row length. A mixture of one has the properties of that corpus.

    Attributes:
      corpora: name -> corpus; the name is that of the folder, with as many parent folders as make it unique.
      weights: whole numbers in proportion to the training rows taken from each corpus.
    """

    corpora: dict[str, Corpus]
    weights: tuple[int, ...] = (1,)

    @classmethod
    def open(cls, data: DataConfig, log: Callable[[str], None] = lambda _: None) -> "Mixture":
        """Opens the folders that `data.corpus` names.

        Raises:
          UserError: as `Corpus.open` and `corpus_folders`; or two are the same folder, or differ in tokenizer or row
            length.
        """
        folders = corpus_folders(data, log)
        corpora = [Corpus.open(folder) for folder in folders]
        paths = [os.fspath(c.path).rstrip("/") if buckets.is_one(c.path) else os.path.realpath(c.path) for c in corpora]
        first = corpora[0]
        for i, corpus in enumerate(corpora):
            if paths[i] in paths[:i]:
                both = f"{corpora[paths.index(paths[i])].path} and {corpus.path}"
                raise UserError(f"data.corpus: {both} are the same folder; name it once, with the sum of the weights")
            if corpus.manifest["tokenizer"]["sha256"] != first.manifest["tokenizer"]["sha256"]:
                what = f"{first.path} and {corpus.path} were made with different tokenizers"
                option = f"--config.tokenizer.path={first.path / first.manifest['tokenizer']['file']}"
                raise UserError(f"data.corpus: {what}; prepare the second with {option}")
            if corpus.seq_len != first.seq_len:
                what = f"{first.path} has rows of {first.seq_len} tokens, and {corpus.path} of {corpus.seq_len}"
                raise UserError(f"data.corpus: {what}; prepare one of them again with the data.seq_len of the other")
        if any(folders.values()):
            weights = [Fraction(weight) for weight in folders.values()]
        else:
            weights = power_weights([corpus.counts["train"]["rows"] for corpus in corpora], data.sampling_alpha)
        named = dict(zip(_unique_names(paths), corpora, strict=True))
        return cls(named, whole_numbers(weights) if len(weights) > 1 else (1,))

    def __str__(self) -> str:
        """Formats the mixture as a value of `data.corpus`."""
        if len(self.corpora) == 1:
            return str(self._first.path)
        weighted = zip(self.corpora.values(), self.weights, strict=True)
        return ",".join(f"{corpus.path}:{weight}" for corpus, weight in weighted)

    @property
    def _first(self) -> Corpus:
        return next(iter(self.corpora.values()))

    @property
    def seq_len(self) -> int:
        """L, tokens per row."""
        return self._first.seq_len

    @property
    def vocab_size(self) -> int:
        """V, size of the tokenizer's vocabulary."""
        return self._first.vocab_size

    @property
    def fractions(self) -> dict[str, float]:
        """Fraction of the training rows that is taken from each corpus, by name."""
        return {name: w / sum(self.weights) for name, w in zip(self.corpora, self.weights, strict=True)}

    @property
    def tokens_per_row(self) -> float:
        """Mean number of tokens in a training row, special tokens left out."""
        train = [corpus.counts["train"] for corpus in self.corpora.values()]
        return sum(f * c["tokens"] / c["rows"] for f, c in zip(self.fractions.values(), train, strict=True))

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which rows are read: equal for the same rows in the same proportion."""
        each = [corpus.fingerprint for corpus in self.corpora.values()]
        return each[0] if len(each) == 1 else files.digest([each, self.weights])

    @property
    def about(self) -> dict[str, Any]:
        """Description and size of the training text, as `Corpus.about`; of several corpora also of each, with its
        fraction of the rows."""
        each = [corpus.about for corpus in self.corpora.values()]
        if len(each) == 1:
            return each[0]
        texts = _texts(each)
        numbers = {key: sum(about[key] for about in each) for key in each[0] if key not in texts}
        fractions = self.fractions.items()
        corpora = {name: {**about, "fraction": f} for (name, f), about in zip(fractions, each, strict=True)}
        return {**texts, **numbers, "corpora": corpora}

    def tokenizer(self) -> Tokenizer:
        """Opens the tokenizer of all corpora. Raises UserError, as that of a corpus."""
        return self._first.tokenizer()

    def split(self, name: str) -> Rows:
        """Returns the rows of "train" or "validation", one corpus after another."""
        return Rows.joined([corpus.split(name) for corpus in self.corpora.values()])

    def stream(self) -> Stream:
        """Returns the order in which the corpora give their training rows."""
        return Stream(tuple(corpus.counts["train"]["rows"] for corpus in self.corpora.values()), self.weights)

    def held_out(self, max_rows: int) -> list[np.ndarray]:
        """Chooses the rows of the split "validation" to evaluate on.

        Args:
          max_rows: 0 takes all rows; a positive number so many, in proportion to the weights and evenly spread, or all
            rows of a corpus that has fewer. Each corpus has one row at least, at the cost of those with most, so that
            none is missing from the result.

        Returns:
          int64 row numbers of each corpus.
        """
        rows = [corpus.counts["validation"]["rows"] for corpus in self.corpora.values()]
        wanted = _at_least_one(counts(self.weights, max_rows)) if max_rows else rows
        starts, taken = itertools.accumulate(rows, initial=0), map(min, rows, wanted)
        return [start + np.arange(m) * n // max(m, 1) for start, n, m in zip(starts, rows, taken, strict=False)]


@dataclasses.dataclass(frozen=True)
class DataCursor:
    """Position of a run in its text: all that has to be saved to continue, whatever was read before.

    Attributes:
      row: number of rows that the run has read.
      first: row of the run from which its present corpora and weights hold.
      taken: fingerprint of a corpus -> number of its rows read before row `first`.
    """

    row: int = 0
    first: int = 0
    taken: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def stream(self, mixture: Mixture) -> Stream:
        """Returns the stream that is read from here.

        The order of a corpus's rows is numbered by when the run first read the corpus, so that it does not change with
        the corpora beside it.
        """
        names = [corpus.fingerprint for corpus in mixture.corpora.values()]
        numbers = {name: number for number, name in enumerate(dict.fromkeys([*self.taken, *names]))}
        starts = tuple(self.taken.get(name, 0) for name in names)
        orders = tuple(numbers[name] for name in names)
        return dataclasses.replace(mixture.stream(), first=self.first, starts=starts, orders=orders)

    def leaving(self, mixture: Mixture) -> "DataCursor":
        """Returns the cursor for other corpora or weights than those of `mixture`, which was read up to here."""
        positions = self.stream(mixture).positions(self.row)
        names = (corpus.fingerprint for corpus in mixture.corpora.values())
        return DataCursor(self.row, self.row, {**self.taken, **dict(zip(names, positions, strict=True))})


def open_corpus(config: Config, log: Callable[[str], None] = print) -> Mixture:
    """Opens the folders of `data.corpus`; without any, the corpus that the rest of the config describes, which is
    prepared first where `data.cache_dir` does not hold it.

    Raises:
      UserError: also when `data.corpus` was made with another tokenizer than `tokenizer.path`.
    """
    if not config.data.corpus:
        corpus = prepare(config, log=log)
        return Mixture({corpus.path.name: corpus})
    mixture = Mixture.open(config.data, log)
    t = config.tokenizer
    if t.path and load_tokenizer(t.path, t.extra_tokens_file).fingerprint != mixture.tokenizer().fingerprint:
        raise UserError(f"data.corpus: {mixture} was made with another tokenizer than {t.path}")
    if mixture.seq_len > (limit := config.model.max_positions):
        needed = f"{mixture.seq_len}, the row length of data.corpus"
        raise UserError(f"model.max_positions is {limit}; expected at least {needed}")
    return mixture


def open_corpora(configs: Sequence[Config], log: Callable[[str], None] = print) -> list[Mixture]:
    """Opens the corpora of each phase of a run; phases with the same data share one object.

    Raises:
      UserError: as `open_corpus` and `check_words`; or the tokenizers differ.
    """
    log = _once(log)  # phases with other weights match the same folders
    mixtures = {data: open_corpus(config, log) for data, config in {config.data: config for config in configs}.items()}
    for config in {(config.data, config.objective.masking): config for config in configs}.values():
        check_words(config, mixtures[config.data], log)
    first, *others = mixtures.values()
    for mixture in others:
        if mixture.tokenizer().fingerprint != first.tokenizer().fingerprint:
            raise UserError(f"train.phases: {mixture} was made with another tokenizer than {first}")
    return [mixtures[config.data] for config in configs]


def _once(log: Callable[[str], None]) -> Callable[[str], None]:
    """Leaves out lines that were logged before."""
    said = set[str]()

    def log_new(line: str) -> None:
        if line not in said:
            said.add(line)
            log(line)

    return log_new


def check_words(config: Config, corpus: Mixture | Corpus, log: Callable[[str], None]) -> None:
    """Logs where words, as `objective.masking` takes them, are not those of the language.

    Raises:
      UserError: whole words are to be masked, and the vocabulary marks none.
    """
    tokenizer, rows, masking = corpus.tokenizer(), corpus.split("train"), config.objective.masking
    if masking == "token" or config.objective.name == "clm":
        return
    tokenizer.require_words(masking)
    if not tokenizer.marks_words:
        log(f"warning: objective.masking is {masking}, and the tokenizer marks no words: each token counts as a word")
    sample = rows.read(np.unique(np.linspace(0, rows.num_rows - 1, _SAMPLE_ROWS).astype(int)))
    if (fraction := words.unspaced(tokenizer.decode(row) for row in sample)) >= 0.01:
        what = "of the text is in scripts that put no spaces between words, such as Thai or kana"
        log(f"warning: objective.masking is {masking}, and {fraction:.0%} {what}: a run of it counts as one word")


def about_of(mixtures: Sequence[Mixture]) -> dict[str, Any]:
    """Joins `Mixture.about` over the phases of a run: the numbers of the first, the text of all."""
    each = [mixture.about for mixture in mixtures]
    return each[0] | _texts(each)


def phases_of(config: Config, mixtures: Sequence[Mixture]) -> list[phases.Phase]:
    """The phases of a config, with the steps that the corpora of each give; the last mixture is that of all further
    phases. Raises UserError.
    """
    found = phases.parse_phases(config)
    known = [mixtures[min(i, len(mixtures) - 1)] for i in range(len(found))]
    return phases.with_corpora(found, [m.seq_len for m in known], [m.tokens_per_row for m in known])


def fingerprint_of(mixtures: Sequence[Mixture]) -> str:
    """Joins `Mixture.fingerprint` over the phases of a run."""
    each = [mixture.fingerprint for mixture in mixtures]
    return each[0] if len(set(each)) == 1 else files.digest(each)


def _at_least_one(numbers: Sequence[int]) -> list[int]:
    """Raises zeros to 1, and lowers the largest numbers by as much where they stay positive."""
    result = [max(1, n) for n in numbers]
    for _ in range(sum(result) - sum(numbers)):
        largest = result.index(max(result))
        result[largest] = max(1, result[largest] - 1)
    return result


def _texts(about: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Joins name and licence of several texts, each once."""
    return {key: "; ".join(dict.fromkeys(a[key] for a in about)) for key in ("name", "licence")}


def _unique_names(paths: Sequence[str]) -> list[str]:
    """Shortens paths to the fewest last components that tell them apart."""
    each = (["/".join(path.split("/")[-length:]) for path in paths] for length in itertools.count(1))
    return next(names for names in each if len(set(names)) == len(names))
