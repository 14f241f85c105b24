"""The laws of masking, for every strategy: on arbitrary rows and vocabularies, and on a million tokens."""

import dataclasses
import functools
from fractions import Fraction
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flax_mlm.config.load import build
from flax_mlm.config.schema import MeshConfig
from flax_mlm.configs import base
from flax_mlm.distributed.batches import shard_batch
from flax_mlm.distributed.mesh import BATCH, make_mesh
from flax_mlm.objectives import masking, rows
from flax_mlm.objectives.rows import Vocabulary, row_keys
from flax_mlm.objectives.targets import Targets, make_targets

STRATEGIES = ("token", "whole_word", "span")
BASE = build(base.get_config()).objective
B, L, V, NUM_SPECIAL = 8, 24, 32, 6  # the same in most tests, so that each strategy is compiled once
KEY = jax.random.key(7)


def objective(strategy, **changes):
    return dataclasses.replace(BASE, masking=strategy, **changes)


def tokenizer(special=(1, 2, 3, 4, 5, 6), starts_word=None, ends_word=None, vocab_size=V):
    """Specials are pad, cls, sep, mask, unk and further ones, in this order."""
    is_special = np.isin(np.arange(vocab_size), special)
    starts = np.ones(vocab_size, bool) if starts_word is None else np.asarray(starts_word, bool)
    pad, cls, sep, mask = special[:4]
    ends = np.zeros(vocab_size, bool) if ends_word is None else np.asarray(ends_word, bool)
    tables = {"is_special": is_special, "starts_word": starts | is_special, "ends_word": ends}
    return SimpleNamespace(**tables, pad_id=pad, cls_id=cls, sep_id=sep, mask_id=mask)


def row_ids(numbers):
    numbers = np.asarray(numbers, np.uint64)
    return np.stack([numbers >> 32, numbers & 0xFFFFFFFF], axis=1).astype(np.uint32)


@functools.cache
def compiled(o, K):
    return jax.jit(
        lambda tokens, ids, key, vocab, rate: masking.mask_tokens(
            tokens, row_keys(key, ids), vocab, o, masking.rates(o, rate), K
        )
    )


def mask(tokens, tok, o, rate=0.15, ids=None, key=KEY, K=None):
    """Masks rows, as NumPy arrays."""
    ids = row_ids(np.arange(len(tokens))) if ids is None else ids
    K = masking.max_predictions_per_row(tokens.shape[1], 1.0) if K is None else K
    vocab = Vocabulary.from_tokenizer(tok)
    result = compiled(o, K)(jnp.asarray(tokens), jnp.asarray(ids), key, vocab, jnp.float32(rate))
    return masking.Masked(*map(np.asarray, result))


def rows_of(masked):
    """Per row: inputs, selected positions, their labels."""
    for inputs, positions, labels, weights in zip(*masked, strict=True):
        yield inputs, positions[weights > 0].tolist(), labels[weights > 0].tolist()


def words_of(tokens, tok):
    """The words of one row, as lists of positions."""
    words, open_word = [], False
    for i, t in enumerate(tokens):
        if tok.is_special[t]:
            open_word = False
        elif open_word and not (tok.starts_word[t] or tok.ends_word[tokens[i - 1]]):
            words[-1].append(i)
        else:
            words.append([i])
            open_word = True
    return words


def expected_count(rate, maskable):
    """Number of predictions: halves round up, at least one where a token is maskable.

    Args:
      rate: a decimal string or a Fraction.
    """
    return max(int(Fraction(rate) * maskable + Fraction(1, 2)), min(maskable, 1))


@st.composite
def cases(draw):
    """(tokenizer, tokens, rate): any ids in any order, between [CLS] and [SEP]; some rows empty or nearly so."""
    special = tuple(draw(st.permutations(range(V)))[:NUM_SPECIAL])
    table = st.lists(st.booleans(), min_size=V, max_size=V)
    tok = tokenizer(special, draw(table), draw(table))
    ordinary = st.sampled_from(np.flatnonzero(~tok.is_special).tolist())
    kinds = {
        "full": st.lists(ordinary, min_size=L - 2, max_size=L - 2),
        "any": st.lists(st.integers(0, V - 1), min_size=0, max_size=L - 2),
        "one": st.lists(ordinary, min_size=1, max_size=1),
        "none": st.lists(st.sampled_from(special), max_size=L - 2),
    }
    tokens = np.full((B, L), tok.pad_id, np.int32)
    for row, kind in enumerate(["full", "any", "any", "any", "full", "one", "none", "blank"]):
        if kind != "blank":
            inner = [tok.cls_id, *draw(kinds[kind]), tok.sep_id]
            tokens[row, : len(inner)] = inner
    return tok, tokens, Fraction(draw(st.integers(1, 1000)), 1000)


def check_laws(strategy, tok, tokens, rate, masked):
    slots = zip(*masked[1:], strict=True)
    for original, (inputs, selected, labels), (positions, all_labels, weights) in zip(
        tokens, rows_of(masked), slots, strict=True
    ):
        maskable = [i for i, t in enumerate(original) if not tok.is_special[t]]
        count = expected_count(rate, len(maskable))
        assert set(selected) <= set(maskable)
        assert selected == sorted(set(selected)), "ascending and without replacement"
        assert labels == original[selected].tolist()
        changed = np.flatnonzero(inputs != original)
        assert set(changed.tolist()) <= set(selected)
        assert all(t == tok.mask_id or not tok.is_special[t] for t in inputs[selected])
        unused = weights == 0
        assert set(weights.tolist()) <= {0.0, 1.0}
        assert (np.diff(weights) <= 0).all()
        assert not positions[unused].any()
        assert not all_labels[unused].any()
        words = words_of(original, tok)
        if strategy != "whole_word":
            assert len(selected) == count
        else:
            check_whole_words(words, set(selected), count)
        if strategy == "span":
            check_spans(words, set(selected))


def check_whole_words(words, selected, count):
    if not any(len(w) <= count for w in words):  # no word fits: token by token
        assert len(selected) == count
        return
    assert all(len(selected & set(w)) in (0, len(w)) for w in words)
    assert min(count, 1) <= len(selected) <= count
    if len(selected) < count:
        assert not any(len(w) == 1 and w[0] not in selected for w in words), "a word was left that would have fitted"


def check_spans(words, selected):
    # A span is whole words; of the one span that may have been cut, the first tokens are there.
    partial = [w for w in words if 0 < len(selected & set(w)) < len(w)]
    assert len(partial) <= 1
    for w in partial:
        assert set(w[: len(selected & set(w))]) == selected & set(w)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases())
def test_laws_hold_for_any_row_and_vocabulary(strategy, case):
    tok, tokens, rate = case
    check_laws(strategy, tok, tokens, rate, mask(tokens, tok, objective(strategy), float(rate)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_with_nothing_to_predict_have_no_slot_in_use(strategy):
    tok = tokenizer()
    tokens = np.full((B, L), tok.pad_id, np.int32)
    tokens[1, :2] = tok.cls_id, tok.sep_id
    masked = mask(tokens, tok, objective(strategy), 1.0)
    np.testing.assert_array_equal(masked.inputs_BL, tokens)
    assert not masked.weights_BK.any()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_token_id_0_is_ordinary_unless_the_vocabulary_says_otherwise(strategy):
    tokens = np.zeros((B, L), np.int32)
    tokens[:, 0], tokens[:, -1] = 2, 3
    masked = mask(tokens, tokenizer(special=(1, 2, 3, 4, 5, 6)), objective(strategy), 0.5)
    assert (masked.weights_BK.sum(1) == (L - 2) // 2).all()
    masked = mask(tokens, tokenizer(special=(0, 2, 3, 4, 5, 6)), objective(strategy), 0.5)
    assert not masked.weights_BK.any()


@pytest.mark.parametrize(
    "rate, maskable, count",
    [("0.15", 10, 2), ("0.15", 30, 5),
     ("0.15", 9, 1), ("0.35", 10, 4), ("0.05", 10, 1), ("0.01", 3, 1), ("1.0", 22, 22),
     ("0.3", 5, 2), ("0.7", 15, 11), ("0.00001", 22, 1)],
)  # fmt: skip
def test_halves_round_up(rate, maskable, count):
    tok = tokenizer()
    tokens = np.full((1, 40), tok.pad_id, np.int32)
    tokens[0, : maskable + 2] = [tok.cls_id, *[9] * maskable, tok.sep_id]
    assert expected_count(rate, maskable) == count
    assert mask(tokens, tok, BASE, float(rate)).weights_BK.sum() == count


@pytest.mark.parametrize(
    ("strategy", "starts"),
    [
        ("token", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("whole_word", [0, 1, 1, 3, 4, 5, 6, 7, 8]),
        ("span", [0, 1, 1, 1, 4, 5, 6, 6, 8]),
    ],
)
def test_units_are_tokens_words_or_spans_of_words_between_special_tokens(strategy, starts):
    vocab = Vocabulary.from_tokenizer(tokenizer(starts_word=np.arange(V) != 9))
    tokens = jnp.asarray([2, 8, 9, 8, 8, 5, 9, 8, 3], jnp.int32)  # 2, 5 and 3 are special
    never_stop = objective("span", span_stop=0.0, span_max_words=2)
    units = {
        "token": lambda: masking.token_units(tokens),
        "whole_word": lambda: masking.word_units(tokens, vocab, jnp.int32(2)),
        "span": lambda: masking.span_units(tokens, vocab, jnp.zeros(9, jnp.uint32), never_stop),
    }[strategy]()
    assert units.start_L.tolist() == starts
    assert units.length_L.tolist() == [starts.count(start) for start in starts]


def test_a_row_without_a_word_that_fits_is_divided_into_tokens():
    vocab = Vocabulary.from_tokenizer(tokenizer(starts_word=np.arange(V) != 9))
    tokens = jnp.asarray([2, 8, 9, 9, 3, 8, 9, 3], jnp.int32)
    assert masking.word_units(tokens, vocab, jnp.int32(1)).length_L.tolist() == [1] * 8
    assert masking.word_units(tokens, vocab, jnp.int32(2)).length_L.tolist() == [1, 3, 3, 3, 1, 2, 2, 1]


def random_rows(num_rows, seq_len, tok, vocab_size, seed=0, segments=2):
    """Full rows of equal segments."""
    rng = np.random.default_rng(seed)
    tokens = rng.choice(np.flatnonzero(~tok.is_special), (num_rows, seq_len)).astype(np.int32)
    tokens[:, :: seq_len // segments] = tok.cls_id
    tokens[:, seq_len // segments - 1 :: seq_len // segments] = tok.sep_id
    return tokens


WORDY = tokenizer(starts_word=np.random.default_rng(3).random(V) < 0.6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_do_not_depend_on_batch_order_or_split(strategy):
    tokens, ids = random_rows(B, L, WORDY, V), row_ids(np.arange(B) + 2**33)
    whole = mask(tokens, WORDY, objective(strategy), ids=ids)
    order = np.random.default_rng(1).permutation(B)
    for expected, actual in zip(whole, mask(tokens[order], WORDY, objective(strategy), ids=ids[order]), strict=True):
        np.testing.assert_array_equal(expected[order], actual)
    for part in (slice(0, 3), slice(3, 6), slice(5, 8)):
        for expected, actual in zip(whole, mask(tokens[part], WORDY, objective(strategy), ids=ids[part]), strict=True):
            np.testing.assert_array_equal(expected[part], actual)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_change_with_stream_position_and_key_only(strategy):
    o, n = objective(strategy), 64
    tokens = np.repeat(random_rows(1, 128, WORDY, V), n, axis=0)  # the same row at other positions of the stream
    first = mask(tokens, WORDY, o, ids=row_ids(np.arange(n)))
    assert len({tuple(p) for p in first.positions_BK.tolist()}) == n
    again = mask(tokens, WORDY, o, ids=row_ids(np.arange(n)))
    np.testing.assert_array_equal(first.inputs_BL, again.inputs_BL)
    for other in (
        mask(tokens, WORDY, o, ids=row_ids(np.arange(n) + 1_000_000)),  # another epoch
        mask(tokens, WORDY, o, ids=row_ids(np.arange(n) + 2**32)),  # differs only in the high word
        mask(tokens, WORDY, o, ids=row_ids(np.arange(n)), key=jax.random.key(8)),
    ):
        assert (first.positions_BK != other.positions_BK).any(axis=1).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_on_an_explicit_mesh_equal_those_of_one_device(strategy):
    tokens, ids = random_rows(16, 64, WORDY, V), row_ids(np.arange(16))
    vocab, o, K = Vocabulary.from_tokenizer(WORDY), objective(strategy), masking.max_predictions_per_row(64, 0.15)

    def targets_on(devices: int) -> Targets:
        """Targets as the train step makes them, the rows split over the mesh."""
        mesh = make_mesh(MeshConfig(data=-1, fsdp=min(devices, 2), tensor=1), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            rows = shard_batch({"tokens": tokens, "row_ids": ids}, mesh)
            rates = masking.rates(o, 0.15)
            return jax.jit(lambda rows: make_targets(o, rows, KEY, vocab, rates, K))(rows)

    for expected, actual in zip(*map(jax.tree.leaves, (targets_on(1), targets_on(8))), strict=True):
        assert actual.sharding.spec[0] == BATCH
        np.testing.assert_array_equal(expected, actual)


def test_segments_count_from_one_and_positions_restart():
    pad, cls, sep = 1, 2, 3
    tokens = jnp.asarray(
        [[cls, 9, 0, sep, cls, 8, sep, cls, sep, pad, pad], [cls] + [9] * 9 + [sep], [pad] * 11], jnp.int32
    )
    segment_ids = rows.segment_ids(tokens, Vocabulary.from_tokenizer(tokenizer()))
    np.testing.assert_array_equal(segment_ids, [[1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0], [1] * 11, [0] * 11])
    positions = rows.positions(segment_ids)
    np.testing.assert_array_equal(positions, [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1], range(11), range(11)])
    assert segment_ids.dtype == jnp.int32
    assert positions.dtype == jnp.int32


@given(seq_len=st.integers(4, 8192), rate=st.integers(1, 1000))
@settings(derandomize=True)
def test_there_are_as_many_prediction_slots_as_the_fullest_row_needs(seq_len, rate):
    assert masking.max_predictions_per_row(seq_len, rate / 1000) == expected_count(Fraction(rate, 1000), seq_len - 2)


def test_no_rate_needs_more_prediction_slots_than_there_are():
    # In float64 some of these float32 rates would round to the other side.
    tok = tokenizer()
    tokens = random_rows(1, 102, tok, V, segments=1)
    for rate in np.linspace(0.01, 1.0, 25, dtype=np.float32):
        K = masking.max_predictions_per_row(102, float(rate))
        assert mask(tokens, tok, BASE, rate).weights_BK.sum() == K


# One million tokens. Seeds are fixed, so a p-value below 1e-4 is a fault and not chance.

N_ROWS, N_LEN, N_COUNT = 8192, 128, 19  # round(0.15 * 126)
BIG_V = 512
BIG = tokenizer(starts_word=np.random.default_rng(5).random(BIG_V) < 0.6, vocab_size=BIG_V)
SMALLEST_P = 1e-4


@functools.cache
def million(strategy):
    tokens = random_rows(N_ROWS, N_LEN, BIG, BIG_V, segments=1)
    return tokens, mask(tokens, BIG, objective(strategy), K=masking.max_predictions_per_row(N_LEN, 0.15))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rate_on_a_million_tokens(strategy):
    counts = million(strategy)[1].weights_BK.sum(1)
    assert counts.max() == N_COUNT
    assert (counts == N_COUNT).mean() > (0.999 if strategy == "whole_word" else 1 - 1e-9)


def test_positions_are_uniform():
    _, masked = million("token")
    observed = np.bincount(masked.positions_BK.ravel(), minlength=N_LEN)[1:-1]
    n = N_LEN - 2
    expected = N_ROWS * N_COUNT / n
    # Drawing without replacement makes counts vary less than a multinomial's.
    statistic = ((observed - expected) ** 2).sum() / expected / (1 - N_COUNT / n) * (n - 1) / n
    assert SMALLEST_P < stats.chi2.sf(statistic, n - 1) < 1 - SMALLEST_P


@pytest.mark.parametrize("strategy", ["token", "whole_word"])
def test_80_10_10(strategy):
    _, masked = million(strategy)
    used = masked.weights_BK > 0
    shown = np.take_along_axis(masked.inputs_BL, masked.positions_BK, 1)[used]
    labels = masked.labels_BK[used]
    hit = 0.1 / (~BIG.is_special).sum()  # a random token that happens to be the original
    observed = [
        (shown == BIG.mask_id).sum(),
        ((shown != labels) & (shown != BIG.mask_id)).sum(),
        (shown == labels).sum(),
    ]
    assert stats.chisquare(observed, used.sum() * np.array([0.8, 0.1 - hit, 0.1 + hit])).pvalue > SMALLEST_P


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_tokens_are_uniform_over_the_ordinary_ids(strategy):
    o = objective(strategy, mask_replace_prob=0.0, random_replace_prob=1.0)
    tokens = np.zeros((N_ROWS, N_LEN), np.int32)
    tokens[:, 0], tokens[:, -1] = BIG.cls_id, BIG.sep_id
    masked = mask(tokens, BIG, o, K=N_COUNT)
    shown = np.take_along_axis(masked.inputs_BL, masked.positions_BK, 1)[masked.weights_BK > 0]
    counts = np.bincount(shown, minlength=BIG_V)
    assert not counts[BIG.is_special].any()
    assert stats.chisquare(counts[~BIG.is_special]).pvalue > SMALLEST_P


def test_whole_words_are_chosen_as_by_berts_greedy_rule():
    tokens, masked = million("whole_word")
    rng, sizes = np.random.default_rng(11), np.zeros((2, 8), int)
    for original, (_, selected, _) in zip(tokens[:2000], rows_of(masked), strict=False):
        words, chosen = words_of(original, BIG), set(selected)
        for w in words:
            sizes[0, min(len(w), 7)] += w[0] in chosen
        left = N_COUNT
        for i in rng.permutation(len(words)):
            if len(words[i]) <= left:
                left -= len(words[i])
                sizes[1, min(len(words[i]), 7)] += 1
    assert stats.chi2_contingency(sizes[:, 1:]).pvalue > SMALLEST_P


def run_lengths(positions):
    positions = np.sort(np.asarray(positions))
    return np.diff(np.flatnonzero(np.r_[True, np.diff(positions) > 1, True]))


def test_spans_are_geometric_and_chosen_at_random():
    tokens, masked = million("span")
    rng, lengths = np.random.default_rng(12), np.zeros((2, N_COUNT + 1), int)
    for original, (_, selected, _) in zip(tokens[:2000], rows_of(masked), strict=False):
        np.add.at(lengths[0], run_lengths(selected), 1)
        spans, words_in_span = [[]], 0
        for word in words_of(original, BIG):  # the definition, word after word
            spans[-1].extend(word)
            words_in_span += 1
            if rng.random() < BASE.span_stop or words_in_span == BASE.span_max_words:
                spans.append([])
                words_in_span = 0
        order = [spans[i] for i in rng.permutation(len(spans))]
        np.add.at(lengths[1], run_lengths([i for span in order for i in span][:N_COUNT]), 1)
    assert stats.chi2_contingency(lengths[:, 1:]).pvalue > SMALLEST_P


def test_a_span_ends_at_its_largest_length_and_is_replaced_as_one():
    o = objective("span", span_stop=0.0, span_max_words=4)
    tok = tokenizer(vocab_size=BIG_V)
    tokens = random_rows(4096, 82, tok, BIG_V, segments=1)  # 20 spans of 4 one-piece words
    masked = mask(tokens, tok, o, rate=0.2, K=16)
    assert (masked.weights_BK == 1).all()
    blocks = masked.positions_BK.reshape(-1, 4)
    assert ((blocks - 1) % 4 == [0, 1, 2, 3]).all()
    shown = np.take_along_axis(masked.inputs_BL, masked.positions_BK, 1).reshape(-1, 4)
    labels = masked.labels_BK.reshape(-1, 4)
    hidden, kept = (shown == tok.mask_id), (shown == labels)
    assert (hidden.all(1) == hidden.any(1)).all()
    observed = [hidden.all(1).sum(), (~hidden.all(1) & ~kept.all(1)).sum(), kept.all(1).sum()]
    assert stats.chisquare(observed, len(blocks) * np.array([0.8, 0.1, 0.1])).pvalue > SMALLEST_P


def test_special_tokens_break_words():
    continues = tokenizer(starts_word=np.zeros(V))  # no ordinary token starts a word
    tokens = np.full((B, L), continues.pad_id, np.int32)
    tokens[:, :10] = [2, 9, 9, 5, 9, 9, 9, 5, 9, 3]
    masked = [mask(tokens, continues, objective("whole_word"), 0.5, ids=row_ids(np.arange(B) + i)) for i in (0, B)]
    assert {tuple(selected) for m in masked for _, selected, _ in rows_of(m)} == {(1, 2, 8), (4, 5, 6)}
