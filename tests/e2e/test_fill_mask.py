"""Filling masks: probabilities that can be worked out by hand, and a model that reads to both sides."""

import itertools
import math
import re

import numpy as np
import pytest

from flax_mlm.config.load import build
from flax_mlm.errors import UserError
from flax_mlm.evaluation import cloze
from flax_mlm.inference.config import read_config
from flax_mlm.inference.load import LoadedModel, load_model
from flax_mlm.inference.mask_filler import MaskFiller

ONE = "The [MASK] barks in the garden at night."
TWO = "The [MASK] [MASK] in the garden at night."


@pytest.fixture(scope="module")
def model(trained_run) -> LoadedModel:
    return load_model(str(trained_run), build(read_config(str(trained_run))))


@pytest.fixture(scope="module")
def filler(model) -> MaskFiller:
    return MaskFiller(model)


@pytest.mark.parametrize("text, masks", [(ONE, 1), (TWO, 2), ("[MASK]", 1), ("a [MASK], [MASK]ing [MASK].", 3)])
def test_top_words_are_ranked_probabilities(filler, model, text, masks):
    everything = filler.top_words(text, model.tokenizer.vocab_size)
    assert len(everything) == masks
    for ranked in everything:
        probabilities = [p for _, p in ranked]
        assert probabilities == sorted(probabilities, reverse=True)
        assert all(0.0 <= p <= 1.0 for p in probabilities)
        assert 0.95 < sum(probabilities) <= 1.0 + 1e-5  # the rest is on special pieces, which are not shown
        special = int(model.tokenizer.is_special.sum())
        assert len(ranked) == model.tokenizer.vocab_size - special
        assert probabilities[-1] > 0.0
    for few, ranked in zip(filler.top_words(text, 4), everything, strict=True):
        assert few == ranked[:4]


def test_the_words_to_the_right_decide(filler, model, toy):
    """The text before the mask is the same; only what follows tells which animal it is."""
    asked = 0
    for animal, does in toy.animals.items():
        if len(model.tokenizer.encode([animal])[0]) == 1:  # a mask is one piece
            assert filler.top_words(f"The [MASK] {does} at night.", 1)[0][0][0] == animal
            asked += 1
    assert asked >= 3


def test_padding_and_other_rows_change_nothing(filler):
    one, two = filler.encode(ONE), filler.encode(TWO)
    alone, together = filler.log_probabilities([one]), filler.log_probabilities([two, one, two] * 4)
    (place,) = filler.mask_positions(one)
    assert [list(scores) for scores in together] == [
        filler.mask_positions(two),
        [place],
        filler.mask_positions(two),
    ] * 4
    np.testing.assert_allclose(together[1][place], alone[0][place], atol=1e-5)
    assert np.isneginf(alone[0][place][filler._model.tokenizer.is_special]).all()


def test_targets_of_one_piece_are_ranked_by_the_scores_of_the_mask(filler, model, toy):
    words = [w for w in toy.animals if len(model.tokenizer.encode([w])[0]) == 1]
    assert len(words) >= 2
    ids = filler.encode(ONE)
    scores_V = filler.log_probabilities([ids])[0][filler.mask_positions(ids)[0]]
    expected = {w: math.exp(scores_V[model.tokenizer.encode([w])[0][0]]) for w in words}
    found = filler.rank_words(ONE, words)
    assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
    assert dict(found) == pytest.approx(expected, rel=1e-4)
    assert found[0][0] == "dog"
    top = dict(filler.top_words(ONE, model.tokenizer.vocab_size)[0])
    assert dict(found) == pytest.approx({w: top[w] for w in words}, rel=1e-4)


@pytest.mark.parametrize("word", ["doghouse", "zebra", "catfish"])
def test_a_target_of_several_pieces_is_the_product_over_its_pieces(filler, model, word):
    pieces = model.tokenizer.encode([word])[0].tolist()
    assert len(pieces) > 1
    ids = filler.encode(ONE)
    (place,) = filler.mask_positions(ids)
    row = [*ids[:place], *[model.tokenizer.mask_id] * len(pieces), *ids[place + 1 :]]
    product = 1.0
    for i, piece in enumerate(pieces):
        product *= math.exp(filler.log_probabilities([row])[0][place + i][piece])
        row[place + i] = piece
    assert dict(filler.rank_words(ONE, [word, "dog", "in"]))[word] == pytest.approx(product, rel=1e-4)
    assert filler.rank_words(ONE, [word, "dog"])[0][0] == "dog"


def test_targets_that_cannot_be_ranked(filler):
    with pytest.raises(UserError, match=r"a text with exactly one \[MASK\]; this one has 2"):
        filler.rank_words(TWO, ["dog"])
    for word in ("", " ", "\u200b"):
        with pytest.raises(UserError, match=f"the word '{word}' is empty, or becomes no token"):
            filler.rank_words(ONE, ["dog", word])
    with pytest.raises(
        UserError, match=r"the text with its longest word has \d+ tokens; this model was trained on at most 32"
    ):
        filler.rank_words(ONE, ["dog", "hippopotamus" * 4])


def test_words_that_the_vocabulary_cannot_spell_are_told(filler, model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "encode_answer", lambda word, _: [model.tokenizer.unk_id] * len(word))
    assert filler.unknown(ONE, ["", "🎉"]) == ["🎉"]


def test_an_answer_of_a_cloze_that_becomes_no_token_is_named(model):
    with pytest.raises(UserError, match=r"--data: the answer '\\u200b' to 'The \[MASK\] sat.' becomes no token"):
        cloze.run(model, [("The [MASK] sat.", ("dog", "\u200b"))])


def test_joint_filling_is_the_best_path_of_the_beam(filler, model):
    """With k = 1: the surest mask first, then the next with it filled, by hand."""
    ids, total = filler.encode(TWO), 0.0
    while masks := filler.mask_positions(ids):
        (scores,) = filler.log_probabilities([ids])
        best, place, piece = max((scores[i][p], i, p) for i in masks for p in range(len(scores[i])))
        ids[place], total = int(piece), total + float(best)
    ((text, probability),) = filler.top_fillings(TWO, 1)
    assert text == model.tokenizer.decode(ids[1:-1])
    assert probability == pytest.approx(math.exp(total), rel=1e-4)


def test_joint_filling_with_a_whole_beam_is_an_exhaustive_search(filler, model):
    """A beam as wide as the vocabulary drops nothing: all pairs, in the order in which the masks are filled."""
    k = model.tokenizer.vocab_size
    ids = filler.encode(TWO)
    (scores,) = filler.log_probabilities([ids])
    first = max(scores, key=lambda i: scores[i].max())
    (second,) = set(filler.mask_positions(ids)) - {first}
    ordinary = np.flatnonzero(~model.tokenizer.is_special)
    rows = [[*ids[:first], int(p), *ids[first + 1 :]] for p in ordinary]
    after = filler.log_probabilities(rows)
    totals = {
        (int(p), int(q)): float(scores[first][p] + after[i][second][q])
        for (i, p), q in itertools.product(enumerate(ordinary), ordinary)
    }
    best = sorted(totals.values(), reverse=True)[:20]
    found = filler.top_fillings(TWO, k)
    assert [p for _, p in found[:20]] == pytest.approx([math.exp(t) for t in best], rel=1e-3)
    pair = max(totals, key=totals.__getitem__)
    filled = list(ids)
    filled[first], filled[second] = pair
    assert found[0][0] == model.tokenizer.decode(filled[1:-1]) == "The dog barks in the garden at night."


def test_texts_that_are_refused(filler):
    with pytest.raises(UserError, match=r"no \[MASK\]"):
        filler.top_words("The dog.", 5)
    with pytest.raises(UserError, match="at most 32"):
        filler.top_words("[MASK] " + "barks " * 40, 5)


def test_a_causal_model_is_refused(toy, causal_run):
    done = toy.run("fill_mask", f"--checkpoint={causal_run}", ONE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: objective.name is clm; expected mlm, the objective that fills masks\n"


def test_the_command(toy, trained_run):
    done = toy.run("fill_mask", f"--checkpoint={trained_run}", "--top_k=3", ONE)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"( +0\.\d{4}  \S+\n){3}", done.stdout)
    assert "  dog\n" in done.stdout.splitlines(True)[0]
    done = toy.run("fill_mask", f"--checkpoint={trained_run}", "--targets=cat,dog,doghouse", f"--text={ONE}", devices=8)
    words = [line.split()[1] for line in done.stdout.splitlines()]
    assert words[0] == "dog"
    assert set(words) == {"cat", "dog", "doghouse"}
    done = toy.run("fill_mask", f"--checkpoint={trained_run}", "--top_k=2", TWO)
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["[MASK] 1", "[MASK] 2", "all masks together"]
    assert lines[-2].endswith("The dog barks in the garden at night.")
