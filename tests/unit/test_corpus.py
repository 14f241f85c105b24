"""The folder on disk: what is written is read, and damage is noticed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_mlm.config.schema import TokenizerConfig
from flax_mlm.data.corpus import MAX_MANIFEST_BYTES, Corpus, row_dtype
from flax_mlm.data.sources.base import UNIT_BYTES
from flax_mlm.data.tokenizer_training import train_tokenizer
from flax_mlm.errors import UserError
from tests.helpers.corpora import L, write_corpus


@pytest.fixture(scope="module")
def tok():
    config = TokenizerConfig("", "", "bpe", 280, "nmt_nfkc", 1.0, 1)
    return train_tokenizer(["the cat sat on the mat and the dog sat on the cat " * 20], config)


@pytest.fixture
def folder(tmp_path, tok):
    write_corpus(tmp_path / "corpus", tok)
    return tmp_path / "corpus"


def test_what_is_written_is_read(tmp_path, tok):
    tokens = write_corpus(tmp_path / "c", tok)
    corpus = Corpus.open(tmp_path / "c")
    assert (corpus.seq_len, corpus.vocab_size, corpus.about["name"], corpus.about["licence"]) == (
        L,
        280,
        "random",
        "none",
    )
    assert corpus.tokenizer().fingerprint == tok.fingerprint
    assert len(list((tmp_path / "c").glob("train-*.crc32.npy"))) == 3
    for name in ("train", "validation"):
        rows = corpus.split(name)
        read = rows.read(np.arange(rows.num_rows))
        assert read.dtype == np.int32
        assert read.shape == (rows.num_rows, L)
        assert sorted(read[read >= 5].tolist()) == tokens[name]
        counts = corpus.counts[name]
        assert counts["rows"] == rows.num_rows
        assert counts["padding"] == (read == rows.pad_id).sum()
        assert counts["tokens"] == counts["words"] == counts["bytes"] == len(tokens[name])
    assert corpus.counts["train"]["documents"] == 27
    assert corpus.counts["validation"]["documents"] == 9


@given(st.data())
def test_rows_in_any_order(tmp_path_factory, tok, data):
    base = tmp_path_factory.getbasetemp() / "any_order"
    if not base.exists():
        write_corpus(base, tok)
    rows = Corpus.open(base).split("train")
    everything = rows.read(np.arange(rows.num_rows))
    index = np.array(data.draw(st.lists(st.integers(0, rows.num_rows - 1), max_size=30)), np.int64)
    np.testing.assert_array_equal(rows.read(index), everything[index])


def test_rows_outside_the_split(folder):
    rows = Corpus.open(folder).split("train")
    for wrong in (-1, rows.num_rows):
        with pytest.raises(IndexError):
            rows.read(np.array([0, wrong]))


def test_fingerprint_follows_the_content_and_not_the_place(folder, tmp_path, tok):
    shutil.copytree(folder, tmp_path / "copy")
    write_corpus(tmp_path / "other", tok, seed=1)
    first, copy, other = (Corpus.open(f).fingerprint for f in (folder, tmp_path / "copy", tmp_path / "other"))
    assert first == copy != other


def edit(folder: Path, **changes) -> None:
    manifest = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: shutil.rmtree(f), "is not a corpus: it has no corpus.json"),
        (lambda f: (f / "corpus.json").unlink(), "is not a corpus"),
        (lambda f: (f / "corpus.json").write_text('{"format": 1'), "corpus.json is damaged"),
        (lambda f: (f / "corpus.json").write_text("[]"), "corpus.json is damaged"),
        (lambda f: edit(f, seq_len=None, splits={}), "corpus.json is damaged"),
        (lambda f: edit(f, format=2), "has corpus format 2; this program reads 3; delete it and prepare again$"),
        (lambda f: edit(f, format=99), "has corpus format 99; this program reads 3"),
        (lambda f: (f / "train-00001.npy").unlink(), "train-00001.npy is missing"),
        (
            lambda f: (f / "train-00001.npy").write_bytes(b"x" * 150),
            "train-00001.npy has 150 bytes; corpus",
        ),
        (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model is missing"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"other"), r"tokenizer.model has 5 bytes; corpus.json says"),
    ],
)
def test_damage_is_noticed_at_open(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        Corpus.open(folder)


def test_one_flipped_bit_is_found_by_reading(folder):
    path = folder / "train-00002.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00002\.npy is damaged"):
        rows = Corpus.open(folder).split("train")
        rows.read(np.arange(rows.num_rows))


def test_large_vocabularies_take_four_bytes():
    assert row_dtype(65536) == np.uint16
    assert row_dtype(65537) == np.uint32


def test_corpus_json_may_list_the_shards_of_many_terabytes(folder):
    splits = json.loads((folder / "corpus.json").read_text())["splits"]
    of_a_unit = sum(len(json.dumps(split["shards"][0], indent=1)) for split in splits.values())
    assert 16e12 / UNIT_BYTES * 2 * of_a_unit < MAX_MANIFEST_BYTES
