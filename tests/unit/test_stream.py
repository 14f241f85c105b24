"""Corpora take turns by their weights: at every row exactly enough, known without history."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flax_mlm.data import stream as stream_lib
from flax_mlm.data.stream import Stream

WEIGHTS = st.lists(st.integers(0, 1000) | st.integers(1, 2**27), min_size=1, max_size=16).filter(any)


def stream(weights, **more) -> Stream:
    return Stream((10,) * len(weights), tuple(weights), **more)


def test_one_corpus_is_its_own_stream():
    rows = np.array([0, 7, 2**40])
    corpus, position = Stream((3,)).locate(rows)
    assert corpus.tolist() == [0, 0, 0]
    assert position.tolist() == rows.tolist()


def test_turns_are_even():
    assert stream([1, 1]).locate(np.arange(6))[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert stream([7, 3]).locate(np.arange(10))[0].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]


@given(WEIGHTS, st.integers(0, 2**50))
def test_after_any_number_of_rows_each_corpus_has_its_share(weights, n):
    """Within half a row for each halving of the list: within one row for up to four corpora, two for sixteen."""
    bound = Fraction(math.ceil(math.log2(len(weights))), 2)
    taken = stream_lib.counts(weights, n)
    assert sum(taken) == n
    for count, weight in zip(taken, weights, strict=True):
        assert abs(count - Fraction(n * weight, sum(weights))) <= bound
        assert weight or not count


@given(WEIGHTS, st.integers(0, 2**50))
def test_rows_are_where_the_counts_say(weights, first):
    """From any row on, and without what was before: each row is the next one of its corpus."""
    taken = stream_lib.counts(weights, first)
    corpus, position = stream(weights).locate(first + np.arange(50))
    for k, p in zip(corpus.tolist(), position.tolist(), strict=True):
        assert p == taken[k]
        taken[k] += 1
    assert taken == stream_lib.counts(weights, first + 50)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), st.integers(0, 5))
def test_in_proportion_to_their_rows_all_corpora_end_together(num_rows, epoch):
    s = Stream(tuple(num_rows), stream_lib.whole_numbers([Fraction(n) for n in num_rows]))
    assert s.epochs(epoch * sum(num_rows)) == [epoch] * len(num_rows)
    assert s.positions(epoch * sum(num_rows)) == tuple(epoch * n for n in num_rows)


@given(WEIGHTS, st.data())
def test_other_weights_go_on_from_the_positions_reached(weights, data):
    """No row of a corpus is left out or comes twice where weights change."""
    later = data.draw(st.lists(st.integers(0, 50), min_size=len(weights), max_size=len(weights)).filter(any))
    change = data.draw(st.integers(0, 200))
    before = stream(weights)
    after = stream(later, first=change, starts=before.positions(change))
    halves = before.locate(np.arange(change)), after.locate(np.arange(change, change + 100))
    corpus, position = (np.concatenate(both) for both in zip(*halves, strict=True))
    for k in range(len(weights)):
        assert position[corpus == k].tolist() == list(range(after.positions(change + 100)[k]))


def test_a_row_beyond_all_counting():
    s, far = stream([7, 2, 1]), 3 * 10**18 + np.arange(1000)
    corpus, position = s.locate(far)
    assert np.bincount(corpus).tolist() == [700, 200, 100]
    assert s.positions(int(far[0]))[corpus[0]] == position[0]
    assert position.max() < 21 * 10**17 + 700


@given(st.lists(st.fractions(Fraction(1, 10**12), 10**12), min_size=1, max_size=8))
def test_weights_as_whole_numbers(weights):
    numbers = stream_lib.whole_numbers(weights)
    assert all(n > 0 for n in numbers)
    assert sum(numbers) <= 2**31 + len(numbers)
    assert math.gcd(*numbers) == 1 or sum(numbers) > 2**30
    for number, weight in zip(numbers, weights, strict=True):
        assert abs(Fraction(number, sum(numbers)) - weight / sum(weights)) < Fraction(len(weights) + 1, 2**31)


def test_simple_weights_are_exact():
    assert stream_lib.whole_numbers([Fraction("0.7"), Fraction("0.3")]) == (7, 3)
    assert stream_lib.whole_numbers([Fraction(20), Fraction(10), Fraction("0.5")]) == (40, 20, 1)


@given(st.lists(st.integers(1, 10**12), min_size=2, max_size=8), st.sampled_from([0.3, 0.5, 0.7, 0.99]))
def test_powers_are_in_proportion(sizes, alpha):
    """The ratios of whole-number weights are those of sizes ** alpha, as far as numbers below 2**31 allow."""
    weights = stream_lib.whole_numbers(stream_lib.power_weights(sizes, alpha))
    assert sum(weights) <= 2**31 + len(sizes)
    total = math.fsum(size**alpha for size in sizes)
    for size, weight in zip(sizes, weights, strict=True):
        assert abs(weight / sum(weights) - size**alpha / total) < (len(sizes) + 1) * 2**-31
    assert [weights[i] for i in np.argsort(sizes, kind="stable")] == sorted(weights)


def test_weights_by_alpha_never_change():
    """They are part of a run's fingerprint."""
    assert stream_lib.power_weights([7, 0, 3], 1.0) == [7, 0, 3]
    found = stream_lib.whole_numbers(stream_lib.power_weights([1_000_000, 20_000, 300], 0.3))
    assert found == (1537236090, 475389484, 134858072)
    assert stream_lib.whole_numbers(stream_lib.power_weights([4, 0], 0.5)) == (1, 0)
