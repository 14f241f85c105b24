"""Training one tokenizer for several corpora, such as languages, on bytes in proportion to their sizes ** alpha.

Each source of `data.source` is read once: all of it, or of larger ones the beginning of each unit, at most
`_READ_FACTOR` times `tokenizer.sample_bytes`, from which their size is estimated. What is kept of it is a uniform
sample, and is thinned as more text is read, so that at most twice `tokenizer.sample_bytes` are in memory. A source that
is smaller than its part is repeated.
"""

import dataclasses
import functools
import hashlib
import heapq
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flax_mlm.config.schema import Config
from flax_mlm.data.preparation_log import progress
from flax_mlm.data.prepare import source_of
from flax_mlm.data.sources.base import Source
from flax_mlm.data.sources.open import split_sources
from flax_mlm.data.stream import power_weights
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.data.tokenizer_training import train_tokenizer
from flax_mlm.errors import UserError, as_user_error
from flax_mlm.storage import files

SOURCES = "sources.json"  # beside the tokenizer: what it was trained on
_READ_FACTOR = 8
_MEASURED_BYTES = 1 << 20  # of each source, for tokens per word and per byte


class TextSample:
    """A uniform sample of texts, by numbers that follow from the position of a text alone.

    Attributes:
      size: bytes of all texts, also of those that are not kept or, by an estimate, not read.
    """

    def __init__(self) -> None:
        self.size = 0
        self._count = self._kept_size = 0
        self._kept: list[tuple[int, int, str]] = []  # a heap: minus the random number, position, text

    def add(self, text: str, max_bytes: int) -> None:
        """Adds a text, and drops those with the largest numbers while `max_bytes` remain without them."""
        size = len(text.encode())
        self.size += size
        number = int.from_bytes(hashlib.blake2b(str(self._count).encode(), digest_size=8).digest())
        if self._kept_size < max_bytes or number < -self._kept[0][0]:
            heapq.heappush(self._kept, (-number, self._count, text))
            self._kept_size += size
            self.thin(max_bytes)
        self._count += 1

    def thin(self, max_bytes: int) -> None:
        """Drops texts while `max_bytes` remain without them."""
        while self._kept and (rest := self._kept_size - len(self._kept[0][2].encode())) >= max_bytes:
            heapq.heappop(self._kept)
            self._kept_size = rest

    def texts(self, num_bytes: int) -> Iterator[str]:
        """Yields so many bytes of text, in the order in which it was read; again from the start where there is less."""
        in_order = [text for _, _, text in sorted(self._kept, key=lambda entry: entry[1])]
        for text in itertools.cycle(in_order):
            content = text.encode()
            if len(content) >= num_bytes:
                yield content[:num_bytes].decode(errors="ignore")
                return
            yield text
            num_bytes -= len(content)


def sample_sources(
    readers: Mapping[str, Callable[[TextSample], None]], alpha: float, max_bytes: int
) -> tuple[dict[str, TextSample], dict[str, int]]:
    """Samples each source, and computes the bytes to take of it.

    Args:
      readers: name -> function that adds the training texts of the source.
      max_bytes: in all; less where there is less text.

    Raises:
      UserError: a source has no text.
    """
    samples: dict[str, TextSample] = {}
    for name, read in readers.items():
        samples[name] = TextSample()
        read(samples[name])
        if not samples[name].size:
            raise UserError(f"data.source: '{name}' has no training text; leave it out, or correct the name")
        for sample, part in zip(samples.values(), _parts(samples, alpha, max_bytes), strict=True):
            sample.thin(part)  # what is still to be read only makes it smaller
    parts = _parts(samples, alpha, min(max_bytes, sum(sample.size for sample in samples.values())))
    for sample, part in zip(samples.values(), parts, strict=True):
        sample.thin(part)
    return samples, dict(zip(samples, parts, strict=True))


def _parts(samples: dict[str, TextSample], alpha: float, total: int) -> list[int]:
    weights = power_weights([sample.size for sample in samples.values()], alpha)
    return [max(1, int(total * weight / sum(weights))) for weight in weights]


def make_tokenizer(config: Config, output: Path, log: Callable[[str], None] = print) -> Tokenizer:
    """Trains the tokenizer of the sources that `data.source` joins by `|`, or opens it where it is made already.

    Args:
      output: the folder to make; prepare each corpus with it as `tokenizer.path`.

    Raises:
      UserError: a source cannot be read, or `output` holds something else or cannot be written.
    """
    d, t = config.data, config.tokenizer
    if t.path:
        raise UserError(f"tokenizer.path is '{t.path}', and --tokenizer_only trains a new tokenizer; leave it empty")
    if t.model_type == "symbols":
        what = "tokenizer.model_type is symbols; expected bpe or unigram with --tokenizer_only"
        raise UserError(f"{what}; prepare one corpus of all sources, and use its folder as tokenizer.path")
    sources = _open(config)
    versions = [source.version for source in sources.values()]
    request = files.digest([1, versions, d.sampling_alpha, d.validation_fraction, dataclasses.asdict(t)])
    if _is_done(output, request):
        log(f"tokenizer: {output}, already made")
        return load_tokenizer(output)

    readers = {name: functools.partial(_read, config, name, source, log) for name, source in sources.items()}
    samples, parts = sample_sources(readers, d.sampling_alpha, t.sample_bytes)
    sample = [text for name, kept in samples.items() for text in kept.texts(parts[name])]
    total = sum(parts.values())
    log(f"tokenizer: training {t.model_type}, vocabulary {t.vocab_size:,}, on {total:,} bytes")
    tokenizer = train_tokenizer(sample, t)
    table = {
        name: {"licence": sources[name].licence, **_about(kept, parts[name], total, tokenizer)}
        for name, kept in samples.items()
    }
    width = max(map(len, table))
    for name, about in table.items():
        ratio = about["sample_bytes"] / about["bytes"]
        part = f"{about['fraction']:6.1%} of the sample ({ratio:.3g} times its text)"
        fertility = f"tokens/word {about['tokens_per_word']:.3f}  tokens/byte {about['tokens_per_byte']:.3f}"
        log(f"    {name:{width}}  {about['bytes']:>14,} bytes, {part}  {fertility}")
    made = {"request": request, "sampling_alpha": d.sampling_alpha, "sources": table}
    with as_user_error(f"--output: {output} cannot be written: ", OSError):
        _save(tokenizer, made, output)
    log(f"tokenizer: {output}; prepare each corpus with --config.tokenizer.path={output}")
    return tokenizer


def _open(config: Config) -> dict[str, Source]:
    """Opens each of the joined sources. Raises UserError."""
    names = split_sources(config.data.source)
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"data.source names '{twice[0]}' twice; name it once")
    return {
        name: source_of(dataclasses.replace(config, data=dataclasses.replace(config.data, source=name)))
        for name in names
    }


def _read(config: Config, name: str, source: Source, log: Callable[[str], None], sample: TextSample) -> None:
    """Adds the training texts of a source to its sample."""
    source.check()
    finished, max_bytes = 0, config.tokenizer.sample_bytes
    with progress(f"sampling {name}", source.size, log) as show:
        for unit in source.units:
            left = max(1, _READ_FACTOR * max_bytes * unit.size // max(source.size, 1))
            counts, before = Counter[str](), sample.size
            for chunk in unit.chunks(counts):
                if chunk.hash >= config.data.validation_fraction:
                    sample.add(chunk.text, max_bytes)
                left -= len(chunk.text)
                if left <= 0:
                    break
            if 0 < counts["read"] < unit.size:  # the rest holds as much text for its size
                sample.size += (sample.size - before) * (unit.size - counts["read"]) // counts["read"]
            show(finished := finished + unit.size)


def _is_done(output: Path, request: str) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    about = files.read_object(output / SOURCES, "request")
    if about is None:
        raise UserError(f"--output: {output} exists and is no tokenizer of several sources; name another folder")
    if about["request"] != request:
        what = f"{output} holds a tokenizer of other text or settings"
        raise UserError(f"--output: {what}; name another folder, or delete that one")
    return True


def _about(kept: TextSample, part: int, total: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Describes a source, its part of the sample, and how many tokens its words and bytes become."""
    texts = list(kept.texts(min(part, kept.size, _MEASURED_BYTES)))
    tokens = sum(len(ids) for ids in tokenizer.encode(texts))
    words, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    return {
        "bytes": kept.size,
        "sample_bytes": part,
        "fraction": part / total,
        "tokens_per_word": tokens / max(words, 1),
        "tokens_per_byte": tokens / max(size, 1),
    }


def _save(tokenizer: Tokenizer, about: dict[str, Any], output: Path) -> None:
    """Writes the folder under a temporary name, and renames it."""
    work = output.with_name(output.name + ".tmp")
    if work.exists() and not {path.name for path in work.iterdir()} <= {tokenizer.filename, SOURCES}:
        raise UserError(f"--output: {work} is not ours, and would be overwritten; move it away")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tokenizer.save(work)
    files.write_json(work / SOURCES, about)
    work.replace(output)
