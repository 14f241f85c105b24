"""Held-out documents follow from their text alone."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_mlm.data.held_out import check_fraction
from flax_mlm.data.sources import base
from flax_mlm.data.sources.base import TextChunk, hashed
from flax_mlm.data.sources.open import open_source
from flax_mlm.errors import UserError


def value(*texts: str) -> float:
    """The hash of a document in these chunks."""
    (value,) = {chunk.hash for chunk in hashed(TextChunk(0, 0, text) for text in texts)}
    return value


def test_hashes_never_change():
    assert value("The same corpus has the same validation split for ever.") == 0.0428805613513662


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_neither_chunks_nor_whitespace_count(texts):
    whole = value("".join(texts))
    assert whole == value(*texts) == value(*(f" {text}\n" for text in texts))
    assert 0 <= whole < 1


def test_only_the_beginning_of_a_long_document_counts(monkeypatch):
    monkeypatch.setattr(base, "_HASHED_BYTES", 10)
    assert value("0123456789") == value("01 234", "56789ab", "c") == value("0123456789", "other")
    assert value("0123456789") != value("012345678")


def test_every_chunk_has_the_hash_of_its_document():
    chunks = [TextChunk(0, document, text) for document, text in ((0, "a"), (0, "b"), (1, "ab"), (2, "c"))]
    result = list(hashed(iter(chunks)))
    assert [chunk[:3] for chunk in result] == [chunk[:3] for chunk in chunks]
    assert result[0].hash == result[1].hash == result[2].hash != result[3].hash


def test_hashes_are_uniform():
    values = sorted(value(f"document {i}") for i in range(2000))
    assert max(abs(v - i / 2000) for i, v in enumerate(values)) < 0.03  # Kolmogorov-Smirnov: p about 0.05


def test_a_document_is_on_the_same_side_in_every_format(tmp_path):
    (tmp_path / "a.txt").write_text("x\n\none two\nthree\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one two\\r\\nthree"}')
    text, jsonl = (
        [chunk.hash for chunk in open_source(f"{kind}:{tmp_path}/*.{end}").chunks(Counter())]
        for kind, end in (("text", "txt"), ("jsonl", "jsonl"))
    )
    assert text[1] == jsonl[0]


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
@given(st.integers(2, 6), st.integers(0, 1000))
def test_the_fraction_that_is_proposed_will_do(tmp_path_factory, fraction, documents, seed):
    file = tmp_path_factory.getbasetemp() / "proposed.txt"
    file.write_text("\n\n".join(f"{seed} {i}" for i in range(documents)))
    source = open_source(f"text:{file}")
    with pytest.raises(UserError, match=f"of the {documents} documents") as error:
        check_fraction(source, fraction)
    check_fraction(source, float(str(error.value).rpartition(" ")[2]))


def test_reading_ends_when_both_splits_have_a_document(tmp_path: Path):
    (tmp_path / "a").write_text("\n\n".join(map(str, range(100_000))))
    counts: Counter[str] = Counter()
    source = open_source(f"text:{tmp_path / 'a'}")

    class Watched:
        name = source.name

        @staticmethod
        def chunks(_):
            return source.chunks(counts)

    check_fraction(Watched, 0.5)
    assert counts["files"] == 1
    assert counts["read"] < source.size
