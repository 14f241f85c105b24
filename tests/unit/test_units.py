"""Making units: the memory that a part of a unit needs."""

import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from flax_mlm.config.load import build
from flax_mlm.config.schema import TokenizerConfig
from flax_mlm.configs import base
from flax_mlm.data.sources import base as sources
from flax_mlm.data.sources.base import Range, TextChunk, Unit
from flax_mlm.data.tokenising import Tokenised
from flax_mlm.data.tokenizer_training import train_tokenizer
from flax_mlm.data.units import make_units
from flax_mlm.data.work import Work

CHUNK = 1 << 16


def unit_of(texts: Iterable[str]) -> Unit:
    return Unit(0, (Range("", 1, lambda counts: iter(enumerate(texts))),))


def a_token_per_byte(jobs: Iterable[list[TextChunk]]) -> Iterator[Tokenised]:
    for job in jobs:
        sizes = [len(chunk.text.encode()) for chunk in job]
        yield job, np.full(sum(sizes), 7, np.uint16), np.array([[size, 1, size] for size in sizes], np.int64)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    for name in ("units", "corpus", "writing"):
        (tmp_path / name).mkdir()
    return Work(tmp_path, tmp_path / "corpus")


@pytest.fixture(scope="module")
def tokenizer():
    config = TokenizerConfig("", "", "bpe", 280, "nmt_nfkc", 1.0, 1)
    return train_tokenizer(["the cat sat on the mat and the dog sat on the cat " * 20], config)


def test_a_part_needs_its_ids_twice_and_not_its_text(work, tokenizer):
    count = 256
    texts = (f"{i:03d}" + "x" * (CHUNK - 3) for i in range(count))
    data = build(base.get_config()).data
    tracemalloc.start()
    make_units([unit_of(texts)], work, tokenizer, data, a_token_per_byte)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    ids = 2 * count * CHUNK
    assert (work.part(0, 0) or {})["train"]["tokens"] > 0.9 * count * CHUNK
    assert peak < 2 * ids + 40_000_000  # for indices while rows are copied


def test_parts_are_divided_by_their_bytes(work, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)
    exactly, ideographs = ["x" * 500] * 4, ["語" * 500] * 2
    assert [chunk.part for chunk in unit_of([*exactly, *ideographs]).chunks()] == [0, 0, 1, 1, 2, 3]
