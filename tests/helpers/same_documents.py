"""The same documents for every format: whatever they are written in, the corpus has the same bytes."""

import hashlib
import random
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from flax_mlm.config.load import build
from flax_mlm.config.schema import Config
from flax_mlm.configs import base
from flax_mlm.data.prepare import prepare
from flax_mlm.data.sources.base import TextChunk
from flax_mlm.data.sources.open import Options, open_source
from tests.helpers import tokenizer_files

COUNT = 5000
_WORDS = (
    "the", "state", "of", "union", 'said: "yes"', "a,b", "c;d", "über", "北京", "🙂", "tab\tbed", "it's", "x=1",
    "{brace}", "back\\slash", "#hash", "|", "<b>", "&amp;", "null", "12", "é",
)  # fmt: skip


@cache
def documents(count: int = COUNT, one_line: bool = False) -> tuple[str, ...]:
    """Different documents with quotes, commas, tabs, newlines and many scripts. Each begins and ends with a word, and
    has no blank lines and no carriage returns.

    Args:
      one_line: without newlines, and without tabs.
    """
    rng = random.Random(count)
    texts = []
    for number in range(count):
        words = rng.choices(_WORDS, k=rng.randint(3, 40))
        spaces = rng.choices([" ", " ", " ", "\n", ", "], k=len(words))
        texts.append(f"document {number} " + "".join(w + s for w, s in zip(words, spaces, strict=True)) + "end")
    return tuple(t.replace("\n", " ").replace("\t", " ") if one_line else t for t in texts)


def read_documents(source: str, options: Options | None = None) -> list[str]:
    """Reads whole documents."""
    return whole(open_source(source, options or Options()).chunks())


def whole(chunks: Iterable[TextChunk]) -> list[str]:
    """Joins the chunks of each document."""
    texts: dict[tuple[int, int], list[str]] = {}
    for chunk in chunks:
        texts.setdefault(chunk[:2], []).append(chunk.text)
    return ["".join(parts) for parts in texts.values()]


def config_for(source: str, tokenizer: Path, **data: object) -> Config:
    """Makes a config that prepares a source with a tokenizer, in this process' time."""
    config = base.get_config()
    config.data.update(source=source, seq_len=64, num_workers=1, **data)
    config.tokenizer.path = str(tokenizer)
    return build(config)


def tokenizer(folder: Path) -> Path:
    """Makes a tokenizer of bytes, which tells all texts apart."""
    return tokenizer_files.folder(folder, tokenizer_files.vocabulary("byte_level"))


def corpus_of(source: str, folder: Path, **data: object) -> dict[str, str]:
    """Prepares a source, and returns the digest of each file of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer"
    config = config_for(source, path if path.exists() else tokenizer(path), **data)
    prepare(config, folder / "corpus", lambda line: None)
    return digests(folder / "corpus")


def digests(corpus: Path) -> dict[str, str]:
    """Returns the digest of each file but `corpus.json`, which names the source."""
    files = sorted(path for path in corpus.iterdir() if path.name != "corpus.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def expected_corpus(folder: Path, texts: Iterable[str] | None = None, **data: object) -> dict[str, str]:
    """Makes the corpus of the documents from a plain text file, and returns the digest of each file of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "expected.txt").write_text("\n\n".join(documents() if texts is None else texts), encoding="utf8")
    return corpus_of(f"text:{folder}/expected.txt", folder, **data)
