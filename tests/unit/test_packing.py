"""Packing writes every token once, in well-formed rows, with little padding."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_mlm.data import packing
from flax_mlm.data.sources.open import open_source

PAD, CLS, SEP, FIRST = 0, 1, 2, 3
MARKS = SimpleNamespace(cls_id=CLS, sep_id=SEP, pad_id=PAD)
MODES = ["best_fit", "sequential"]


def segments(rows: np.ndarray) -> list[list[list[int]]]:
    """The segments of each row without their [CLS] and [SEP]; checks the form of the row."""
    result = []
    for row in rows.tolist():
        while row and row[-1] == PAD:
            row.pop()
        assert row
        assert row[0] == CLS
        assert row[-1] == SEP
        found: list[list[int]] = []
        for before, token in zip([SEP, *row], row, strict=False):
            assert (before == SEP) == (token == CLS)  # a segment begins right after the one before it
            if token == CLS:
                found.append([])
            elif token != SEP:
                assert token >= FIRST
                found[-1].append(token)
        assert all(found)
        result.append(found)
    return result


@given(st.lists(st.integers(0, 60), max_size=40), st.integers(4, 24), st.sampled_from(MODES), st.integers(1, 99))
def test_every_token_is_written_once(lengths, seq_len, mode, block):
    tokens = np.arange(FIRST, FIRST + sum(lengths), dtype=np.uint16)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(packing, "_BLOCK_TOKENS", block)
        rows = packing.pack(tokens, np.array(lengths, np.int64), seq_len, MARKS, mode)
    assert rows.shape[1] == seq_len
    assert rows.dtype == np.uint16
    flat = [s for row in segments(rows) for s in row]
    written = [t for s in flat for t in s]
    if mode == "sequential":
        assert written == tokens.tolist()
    assert sorted(written) == tokens.tolist()
    # A segment is a run of one document.
    document = np.repeat(np.arange(len(lengths)), lengths)
    for s in flat:
        assert s == list(range(s[0], s[0] + len(s)))
        assert len(set(document[np.array(s) - FIRST])) == 1
    again = packing.pack(tokens, np.array(lengths, np.int64), seq_len, MARKS, mode)
    np.testing.assert_array_equal(rows, again)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_best_fit_leaves_no_two_rows_that_fit_in_one(lengths):
    rows = packing.pack(np.full(sum(lengths), FIRST), np.array(lengths), 16, MARKS, "best_fit")
    used = np.sort((rows != PAD).sum(axis=1))
    assert len(used) < 2 or used[0] + used[1] > 16


def test_best_fit_takes_the_tightest_row():
    # Segments of 7 and 5 open rows of 10, which leaves room for 3 and for 5; the one of 3 goes to the first.
    chunks, row = packing.best_fit(np.array([5, 0, 3, 1]), 10)
    assert chunks.tolist() == [5, 3, 1]
    assert row.tolist() == [0, 1, 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seq_len", [128, 512])
def test_little_padding_on_prose(mode, seq_len):
    documents: Counter[int] = Counter()
    for chunk in open_source("builtin").chunks(Counter()):
        documents[chunk.document] += len(chunk.text.split())
    lengths = np.array(list(documents.values()))
    rows = packing.pack(np.full(lengths.sum(), FIRST, np.uint16), lengths, seq_len, MARKS, mode)
    assert (rows == PAD).mean() < 0.01


def test_many_short_documents_pack_fast_and_tight():
    lengths = np.random.default_rng(0).integers(1, 200, 200_000)
    rows = packing.pack(np.full(lengths.sum(), FIRST, np.uint16), lengths, 128, MARKS, "best_fit")
    assert (rows == PAD).mean() < 0.01
