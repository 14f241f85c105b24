"""Corpora that are weighted by rows ** alpha, found by patterns, and all present in a held-out sample."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_mlm.config import phases
from flax_mlm.config.load import build
from flax_mlm.config.schema import DataConfig
from flax_mlm.configs import base, mmbert_base
from flax_mlm.data.corpus import MANIFEST
from flax_mlm.data.mixture import DataCursor, Mixture, _at_least_one, open_corpora
from flax_mlm.data.tokenizer_training import train_tokenizer
from flax_mlm.errors import UserError
from flax_mlm.evaluation import metrics, report
from flax_mlm.planning.report import mixture_lines
from tests.helpers.corpora import write_corpus


def data(corpus: str, alpha: float = 1.0) -> DataConfig:
    return dataclasses.replace(build(base.get_config()).data, corpus=corpus, sampling_alpha=alpha)


@pytest.fixture(scope="module")
def tok():
    config = dataclasses.replace(build(base.get_config()).tokenizer, vocab_size=280)
    return train_tokenizer(["the cat sat on the mat and the dog sat on the cat " * 20], config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tok) -> Path:
    """With corpora `corpora/de`, `corpora/en` and `corpora/sw`, and two folders beside them that are none."""
    folder = tmp_path_factory.mktemp("sampling")
    (folder / "corpora").mkdir()
    for seed, (name, documents) in enumerate({"sw": 3, "en": 90, "de": 30}.items()):
        write_corpus(folder / "corpora" / name, tok, seed, documents=documents)
    (folder / "corpora" / "fr.tmp").mkdir()
    (folder / "corpora" / "notes").mkdir()
    (folder / "corpora" / "readme.txt").touch()
    return folder


# Weights


@pytest.mark.parametrize("alpha", [0.7, 0.5, 0.3, 0.01])
def test_rows_are_taken_in_proportion_to_their_power(folders, alpha):
    mixture = Mixture.open(data(f"{folders}/corpora/*", alpha))
    rows = np.array([corpus.counts["train"]["rows"] for corpus in mixture.corpora.values()])
    assert list(mixture.fractions.values()) == pytest.approx(list(rows**alpha / (rows**alpha).sum()), abs=1e-8)
    taken = mixture.stream().positions(10_000)
    assert sum(taken) == 10_000
    assert taken == pytest.approx(10_000 * rows**alpha / (rows**alpha).sum(), abs=1)


def test_alpha_of_one_is_the_mixture_without(folders):
    mixture = Mixture.open(data(f"{folders}/corpora/*"))
    rows = mixture.stream().num_rows
    assert mixture.stream().epochs(sum(rows)) == [1.0] * 3
    found = {Mixture.open(data(f"{folders}/corpora/*", alpha)).fingerprint for alpha in (1.0, 0.7, 0.5)}
    assert len(found) == 3
    assert mixture.fingerprint in found


def test_the_text_of_a_mixture_opens_it_again(folders):
    mixture = Mixture.open(data(f"{folders}/corpora/*", 0.3))
    assert Mixture.open(data(str(mixture))).fingerprint == mixture.fingerprint


@pytest.mark.parametrize("alpha", [0.0, -0.5, 1.5])
def test_what_no_alpha_is(alpha):
    c = base.get_config()
    c.data.sampling_alpha = alpha
    with pytest.raises(UserError, match=re.escape(f"data.sampling_alpha is {alpha}; expected a number in (0, 1]")):
        build(c)


def test_weights_and_alpha_are_refused_together():
    c = base.get_config()
    c.data.update({"corpus": "a:0.7,b:0.3", "sampling_alpha": 0.7})
    with pytest.raises(UserError) as error:
        build(c)
    what = "data.sampling_alpha is 0.7, and data.corpus has weights ('a:0.7,b:0.3'); expected one of the two"
    assert str(error.value) == f"{what}; leave out the weights, or set data.sampling_alpha=1"


def test_a_phase_may_turn_from_weights_to_alpha():
    c = base.get_config()
    c.data.corpus = "a:0.7,b:0.3"
    c.train.phases = "50%: data.corpus=a,b,c, data.sampling_alpha=0.5; 75%: data.sampling_alpha=0.3"
    found = [phase.config.data for phase in phases.parse_phases(build(c))]
    assert [(d.corpus, d.sampling_alpha) for d in found] == [("a:0.7,b:0.3", 1.0), ("a,b,c", 0.5), ("a,b,c", 0.3)]
    c.train.phases = "50%: data.sampling_alpha=0.5"
    with pytest.raises(UserError, match=r"train\.phases: 'data\.sampling_alpha=0\.5': .* has weights"):
        build(c)


NAMES, ALPHAS = st.sampled_from(["en", "en,sw", "sw,en", "de,en,sw"]), st.sampled_from([1.0, 0.5, 0.3])


@given(st.lists(st.tuples(st.integers(0, 200), NAMES, ALPHAS), min_size=2, max_size=5))
def test_corpora_go_on_exactly_where_alpha_changes_and_others_join(folders, turns):
    seen: dict[str, list[int]] = {}
    orders: dict[str, set[int]] = {}
    cursor, before = DataCursor(), None
    for rows, names, alpha in turns:
        now = Mixture.open(data(",".join(f"{folders}/corpora/{name}" for name in names.split(",")), alpha))
        cursor = cursor if before is None else cursor.leaving(before)
        stream = cursor.stream(now)
        corpus, position = stream.locate(np.arange(cursor.row, cursor.row + rows))
        for c, p in zip(corpus.tolist(), position.tolist(), strict=True):
            name = list(now.corpora)[c]
            seen.setdefault(name, []).append(p)
            orders.setdefault(name, set()).add(stream.orders[c])
        cursor, before = dataclasses.replace(cursor, row=cursor.row + rows), now
    for name, positions in seen.items():
        assert positions == list(range(len(positions))), name
        assert len(orders[name]) == 1, name


def test_the_recipe_of_mmbert():
    """Three phases, in which corpora join and mask rate and alpha fall."""
    found = phases.parse_phases(build(mmbert_base.get_config("languages")))
    assert [list(p.config.data.folders()) for p in found] == [
        ["languages/1024/*"],
        ["languages/8192/*"],
        ["languages/8192/*", "languages/8192_decay/*"],
    ]
    assert [p.config.data.sampling_alpha for p in found] == [0.7, 0.5, 0.3]
    assert [p.config.objective.mask_rate for p in found] == [0.3, 0.15, 0.05]
    assert [round(p.end - p.begin, 3) for p in found] == [0.767, 0.2, 0.033]
    assert {p.config.model.rope_theta_local for p in found[1:]} == {160_000.0}
    alone = phases.parse_phases(build(mmbert_base.get_config()))
    assert [p.config.data.seq_len * p.config.train.global_batch_size for p in alone] == [4608 * 1024] * 3


def test_the_plan_has_what_each_phase_reads(folders):
    c = base.get_config()
    c.data.corpus = f"{folders}/corpora/en,{folders}/corpora/de"
    c.train.update({"steps": 100, "global_batch_size": 8})
    c.train.phases = f"50%: data.corpus={folders}/corpora/*, data.sampling_alpha=0.5"
    found = phases.parse_phases(build(c))
    mixtures = [Mixture.open(phase.config.data) for phase in found]
    lines = list(mixture_lines(found, mixtures))
    assert lines[0] == "data        from 0% on 2 corpora, by rows ** 1"
    assert lines[3] == "data        from 50% on 3 corpora, by rows ** 0.5"
    assert [line.split()[0] for line in lines[4:]] == ["de", "en", "sw"]
    fraction, rows = mixtures[1].fractions["sw"], mixtures[1].stream().num_rows[2]
    assert f"{fraction:.1%} of the rows read ({fraction * 400 / rows:.2f} epochs)" in lines[6]


# Patterns


def test_what_a_pattern_leaves_out_is_said_once_for_all_phases(folders):
    c = base.get_config()
    c.data.corpus = f"{folders}/corpora/*"
    c.train.phases = "50%: data.sampling_alpha=0.5; 90%: data.sampling_alpha=0.3"
    lines: list[str] = []
    open_corpora([phase.config for phase in phases.parse_phases(build(c))], lines.append)
    assert len([line for line in lines if "also matches" in line]) == 1


def test_a_pattern_stands_for_the_corpora_in_order(folders, monkeypatch):
    lines: list[str] = []
    mixture = Mixture.open(data(f"{folders}/corpora/*"), lines.append)
    assert list(mixture.corpora) == ["de", "en", "sw"]
    (line,) = lines
    assert "also matches" in line
    assert f"{folders}/corpora/fr.tmp, {folders}/corpora/notes, without corpus.json: no corpora, and not read" in line
    monkeypatch.chdir(folders / "corpora")
    assert list(Mixture.open(data("[es]*")).corpora) == ["en", "sw"]
    assert list(Mixture.open(data("sw,[de]?")).corpora) == ["sw", "de", "en"]


def test_a_folder_of_that_name_goes_first(folders, tok, tmp_path):
    (tmp_path / "a[bc]").mkdir()
    for name in ("a[bc]/*", "a[bc]/x"):
        write_corpus(tmp_path / name, tok)
    assert list(Mixture.open(data(f"{tmp_path}/a[bc]/*")).corpora) == ["*"]
    assert list(Mixture.open(data(f"{tmp_path}/a[bc]/?")).corpora) == ["*", "x"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{0}/nothing/*", "data.corpus: '{0}/nothing/*' matches no corpus (from "),
        ("{0}/corpora/n*", "which hold " + MANIFEST),
        ("{0}/corpora/*:2", "'{0}/corpora/*' is a pattern with a weight, 2; name each folder with its weight"),
        ("{0}/corpora/e*,{0}/corpora/en", "'{0}/corpora/en' is matched by '{0}/corpora/e*' and named twice so"),
    ],
)
def test_patterns_that_are_refused(folders, text, said):
    with pytest.raises(UserError, match=re.escape(said.format(folders))) as error:
        Mixture.open(data(text.format(folders)))
    assert "\n" not in str(error.value)


# Held-out rows and results


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9))
def test_every_corpus_has_a_row(numbers):
    result = _at_least_one(numbers)
    assert min(result) >= 1
    assert sum(result) == max(sum(numbers), len(numbers))
    for before, after in zip(numbers, result, strict=True):
        assert after <= max(before, 1)


def test_a_small_sample_has_rows_of_all(folders):
    mixture = Mixture.open(data(f"{folders}/corpora/en:1000,{folders}/corpora/sw:1,{folders}/corpora/de:1"))
    assert [len(rows) for rows in mixture.held_out(9)] == [7, 1, 1]
    assert [len(rows) for rows in mixture.held_out(1)] == [1, 1, 1]


def test_fertility_is_of_each_and_of_all():
    counts = {"en": {"tokens": 30, "words": 20, "bytes": 100}, "zh": {"tokens": 10, "words": 0, "bytes": 60}}
    found = metrics.fertility(counts)
    assert found == {
        "tokens_per_word": 2.0, "tokens_per_word/en": 1.5, "tokens_per_word/zh": 10.0,
        "tokens_per_byte": 0.25, "tokens_per_byte/en": 0.3, "tokens_per_byte/zh": pytest.approx(1 / 6),
    }  # fmt: skip
    assert metrics.fertility({"en": counts["en"]}) == {"tokens_per_word": 1.5, "tokens_per_byte": 0.3}


def test_a_corpus_without_predictions_is_in_the_table():
    sums = [np.array([2.0, 3.0, 0.0, 0.0]), np.array([1.0, 5.0, 0.0, 0.0]), np.array([1.0, 2.0, 0.0, 0.0])]
    result = metrics.by_corpus(sums, {"en": 2, "sw": 1}, "predicted_tokens")
    assert result["loss/en"] == 6 / 5
    assert (result["rows/en"], result["rows/sw"], result["predicted_tokens/sw"]) == (2, 0, 0)
    assert "loss/sw" not in result
    result |= metrics.fertility({name: {"tokens": 3, "words": 2, "bytes": 12} for name in ("en", "sw")})
    head, en, sw = report.corpus_lines(result, "predicted_tokens")
    assert head == "by corpus:"
    columns = ["loss 1.2000 ± 0.3960", "accuracy 0.6000", "tokens/word 1.500", "tokens/byte 0.250"]
    assert en == f"    en  {'  '.join(columns)}          5 tokens in 2 rows"
    assert sw == "    sw  has no held-out tokens to predict"
    result |= {"rows/en": 1, "bits_per_byte/en": 1.25}
    assert "loss 1.2000  accuracy 0.6000  bits/byte 1.250" in report.corpus_lines(result, "predicted_tokens")[1]
