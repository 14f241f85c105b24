"""Several corpora in one run: what is opened, what is refused, and that a run of them is as good as any."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from flax_mlm.checkpoint.store import saved_steps
from flax_mlm.config.load import build
from flax_mlm.config.schema import DataConfig
from flax_mlm.configs import base
from flax_mlm.data.corpus import Corpus
from flax_mlm.data.mixture import Mixture
from flax_mlm.data.tokenizer_training import train_tokenizer
from flax_mlm.errors import UserError
from tests.helpers.corpora import write_corpus
from tests.helpers.runs import assert_same_run, finish, metrics_of


def data(corpus: str) -> DataConfig:
    return dataclasses.replace(build(base.get_config()).data, corpus=corpus)


@pytest.mark.parametrize(
    ("text", "folders"),
    [
        ("", {}),
        ("corpora/wiki", {"corpora/wiki": ""}),
        ("corpora/wiki:0.7,corpora/books:0.3", {"corpora/wiki": "0.7", "corpora/books": "0.3"}),
        ("a:2, b:1e-3 ,c:.5", {"a": "2", "b": "1e-3", "c": ".5"}),
        ("a,b", {"a": "", "b": ""}),
        ("gs://bucket/a,gs://bucket/b", {"gs://bucket/a": "", "gs://bucket/b": ""}),
        ("gs://bucket/a:7,gs://bucket/b:3", {"gs://bucket/a": "7", "gs://bucket/b": "3"}),
        ("a:b:2,a:c:1", {"a:b": "2", "a:c": "1"}),
        ("a:b,c:d", {"a:b": "", "c:d": ""}),
        ("wiki:1", {"wiki": "1"}),
    ],
)
def test_folders_and_weights_are_told_apart(text, folders):
    assert data(text).folders() == folders


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:0,b:1", "the weight of 'a' is 0, not a positive number"),
        ("a:1,b:-2", "the weight of 'b' is -2"),
        ("a:nan,b:1", "the weight of 'a' is nan"),
        ("a:1e999999999,b:1", "the weight of 'a' is 1e999999999"),
        ("a:1.2.3,b:1", "the weight of 'a' is 1.2.3"),
        ("a:1,b", "'b' has no weight, but others have"),
        ("a,,b", "'a,,b' has an empty item"),
        (":1,b:1", "':1,b:1' has an empty item"),
        ("a:1,a:2", "'a' is named twice"),
    ],
)
def test_weights_that_are_none(text, said):
    c = base.get_config()
    c.data.corpus = text
    with pytest.raises(UserError, match=re.escape(f"data.corpus: {said}")):
        build(c)


def test_a_folder_may_be_called_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:1,b:2", "c:3", "d,e"):
        (tmp_path / name).mkdir()
    assert data("a:1,b:2").folders() == {"a:1,b:2": ""}
    assert data("a:1,b:2,c:3").folders() == {"a:1,b:2": "", "c:3": ""}
    assert data("c:3:0.5, d,e:0.25, f:1").folders() == {"c:3": "0.5", "d,e": "0.25", "f": "1"}


@pytest.fixture(scope="module")
def tok():
    config = dataclasses.replace(build(base.get_config()).tokenizer, vocab_size=280)
    return train_tokenizer(["the cat sat on the mat and the dog sat on the cat " * 20], config)


@pytest.fixture
def folders(tmp_path, tok) -> Path:
    """With corpora `wiki` and `books`."""
    for seed, name in enumerate(("wiki", "books")):
        write_corpus(tmp_path / name, tok, seed)
    return tmp_path


def test_one_folder_is_the_corpus_itself(folders):
    for text in (f"{folders}/wiki", f"{folders}/wiki:0.7"):
        alone, corpus = Mixture.open(data(text)), Corpus.open(folders / "wiki")
        assert str(alone) == str(corpus.path)
        assert alone.weights == (1,)
        assert list(alone.corpora) == ["wiki"]
        for name in ("fingerprint", "about", "seq_len", "vocab_size"):
            assert getattr(alone, name) == getattr(corpus, name), name
        assert alone.split("train") == corpus.split("train")
        n = corpus.counts["train"]
        assert alone.tokens_per_row == n["tokens"] / n["rows"]


def test_several_folders_are_one_corpus_after_another(folders):
    mixture = Mixture.open(data(f"{folders}/wiki:0.7,{folders}/books:0.3"))
    wiki, books = (Corpus.open(folders / name) for name in ("wiki", "books"))
    assert list(mixture.corpora) == ["wiki", "books"]
    assert mixture.weights == (7, 3)
    for split in ("train", "validation"):
        both, parts = mixture.split(split), [corpus.split(split) for corpus in (wiki, books)]
        read = [rows.read(np.arange(rows.num_rows)) for rows in (both, *parts)]
        np.testing.assert_array_equal(read[0], np.concatenate(read[1:]))
    assert mixture.stream().num_rows == (wiki.split("train").num_rows, books.split("train").num_rows)
    about = mixture.about
    assert about["rows"] == sum(mixture.stream().num_rows)
    assert about["name"] == "random"
    assert {name: text["fraction"] for name, text in about["corpora"].items()} == {"wiki": 0.7, "books": 0.3}
    means = [corpus.counts["train"]["tokens"] / corpus.counts["train"]["rows"] for corpus in (wiki, books)]
    assert mixture.tokens_per_row == pytest.approx(0.7 * means[0] + 0.3 * means[1])


def test_without_weights_every_row_is_worth_the_same(folders):
    mixture = Mixture.open(data(f"{folders}/wiki,{folders}/books"))
    rows = mixture.stream().num_rows
    assert mixture.stream().epochs(sum(rows)) == [1.0, 1.0]
    assert rows[0] != rows[1]


def test_the_fingerprint_follows_rows_and_weights(folders):
    same = ["wiki:7,books:3", "wiki:0.7,books:0.3", "wiki:70,books:30"]
    others = ["wiki:6,books:4", "books:7,wiki:3", "books:3,wiki:7", "wiki:7", "books:3"]
    found = [
        Mixture.open(data(",".join(f"{folders}/{part}" for part in text.split(",")))).fingerprint
        for text in same + others
    ]
    assert len(set(found[:3])) == 1
    assert len(set(found)) == 1 + len(others)


def test_the_text_of_a_mixture_opens_it_again(folders):
    mixture = Mixture.open(data(f"{folders}/wiki:2,{folders}/books:0.5"))
    assert str(mixture) == f"{folders}/wiki:4,{folders}/books:1"
    assert Mixture.open(data(str(mixture))).fingerprint == mixture.fingerprint


def test_names_tell_the_corpora_apart(folders, tok):
    (folders / "old").mkdir()
    write_corpus(folders / "old" / "wiki", tok, 3)
    names = list(Mixture.open(data(f"{folders}/wiki/,{folders}/old/wiki")).corpora)
    assert names == [f"{folders.name}/wiki", "old/wiki"]


def test_held_out_rows_are_spread_by_weight(folders):
    mixture = Mixture.open(data(f"{folders}/wiki:3,{folders}/books:1"))
    n, m = (corpus.counts["validation"]["rows"] for corpus in mixture.corpora.values())
    assert n >= 9
    assert m >= 9
    everything = mixture.held_out(0)
    assert [part.tolist() for part in everything] == [list(range(n)), list(range(n, n + m))]
    some = mixture.held_out(8)
    assert [len(part) for part in some] == [6, 2]
    assert some[0].tolist() == [i * n // 6 for i in range(6)]
    assert some[1].tolist() == [n, n + m // 2]
    assert [len(part) for part in mixture.held_out(4 * n)] == [n, min(n, m)]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("nowhere", "nowhere is not a corpus"),
        ("../{0}/wiki", "are the same folder; name it once, with the sum of the weights"),
        ("link", "are the same folder"),
        ("other_tokenizer", "were made with different tokenizers; prepare the second with --config.tokenizer.path="),
        ("longer", "has rows of 8 tokens, and {1}/longer of 16; prepare one of them again with the data.seq_len"),
    ],
)
def test_folders_that_do_not_go_together(folders, tok, second, said):
    (folders / "link").symlink_to(folders / "wiki")
    config = dataclasses.replace(build(base.get_config()).tokenizer, vocab_size=280)
    other = train_tokenizer(["a very different text of birds that sing in the morning " * 20], config)
    write_corpus(folders / "other_tokenizer", other)
    write_corpus(folders / "longer", tok, length=16)
    text = f"{folders}/wiki:1,{folders}/{second.format(folders.name)}:2"
    with pytest.raises(UserError, match=re.escape(said.format("", folders))) as error:
        Mixture.open(data(text))
    assert "\n" not in str(error.value)
    assert str(folders / "wiki") in str(error.value) or second == "nowhere"


STEPS = 12
SHORT = {
    **{"train__steps": STEPS, "train__checkpoint_every": 4, "train__keep_period": 4, "train__eval_every": 5},
    **{"model__glu": True, "model__type_vocab_size": 0},  # a ModernBERT, to be exported
}


@pytest.fixture(scope="module")
def both(toy) -> str:
    """The toy corpus and another one, as `data.corpus` takes them."""
    text = toy.folder / "more.txt"
    text.write_text("\n\n".join(f"The {animal} {does} today. It was seen." for animal, does in toy.animals.items()) * 4)
    flags = toy.flags(data__corpus="", data__source=f"text:{text}", tokenizer__path=toy.corpus)
    done = toy.run("prepare", *flags, "--config.data.validation_fraction=0.25", f"--output={toy.folder / 'more'}")
    assert done.returncode == 0, done.stderr
    return f"{toy.corpus}:3,{toy.folder / 'more'}:1"


@pytest.fixture(scope="module")
def straight(toy, both) -> Path:
    workdir = toy.folder / "mixed"
    out = finish(toy, workdir, *toy.flags(**SHORT, data__corpus=both))
    (toy.folder / "mixed.log").write_text(out)
    return workdir


def test_a_run_says_what_it_takes_from_each(toy, both, straight):
    out, mixture = (toy.folder / "mixed.log").read_text(), Mixture.open(data(both))
    rows = dict(zip(mixture.corpora, mixture.stream().num_rows, strict=True))
    for name, share in (("corpus", 3 / 4), ("more", 1 / 4)):
        epochs = share * 16 * STEPS / rows[name]
        assert f"{share:.1%} of the rows ({epochs:.2f} epochs)" in out
        for line in metrics_of(straight):
            assert abs(line[f"epochs/{name}"] * rows[name] - share * 16 * line["step"]) <= 0.5
        assert f"  epochs/{name} {metrics_of(straight)[-1][f'epochs/{name}']:.2f}" in out
    assert rows["more"] < 16 * STEPS / 4, "the smaller one is read more than once"
    (first, *_), result = metrics_of(straight, "validation"), json.loads((straight / "result.json").read_text())
    line = next(line for line in out.splitlines() if line.startswith(f"step 5/{STEPS}  validation"))
    assert line.endswith(f"  corpus {first['loss/corpus']:.4f}  more {first['loss/more']:.4f}")
    counts = [result["predicted_tokens/corpus"], result["predicted_tokens/more"]]
    assert sum(counts) == result["predicted_tokens"]
    losses = [result["loss/corpus"], result["loss/more"]]
    assert np.dot(losses, counts) / sum(counts) == pytest.approx(result["loss"])
    held_out = mixture.corpora["more"].counts["validation"]
    bits = losses[1] / np.log(2) * held_out["tokens"] / held_out["bytes"]
    assert result["bits_per_byte/more"] == pytest.approx(bits)
    assert "by corpus:" in out


@pytest.mark.parametrize("step", [4, pytest.param(8, marks=pytest.mark.full)])
def test_it_goes_on_as_if_it_had_not_been_stopped(toy, both, straight, tmp_path, step):
    workdir = shutil.copytree(straight, tmp_path / "copy")
    for later in saved_steps(workdir):
        if later > step:
            shutil.rmtree(workdir / "checkpoints" / str(later))
    out = finish(toy, workdir, *toy.flags(**SHORT, data__corpus=both))
    assert f"restored step {step}" in out
    assert_same_run(workdir, straight, STEPS)


def test_other_weights_are_another_run(toy, both, straight):
    done = toy.run("train", f"--workdir={straight}", *toy.flags(**SHORT, data__corpus=both.replace(":3", ":2")))
    assert done.returncode == 2
    assert "it had corpora in the proportions 0.75:0.25, not 0.667:0.333; give the same" in done.stderr


def test_the_other_commands_take_it_too(toy, both, straight, tmp_path):
    result = json.loads((straight / "result.json").read_text())
    done = toy.run("evaluate", f"--checkpoint={straight}", "--mask_rates=", f"--json={tmp_path / 'x'}")
    assert done.returncode == 0, done
    assert "by corpus:\n    corpus  loss " in done.stdout, done
    found = json.loads((tmp_path / "x").read_text())
    assert result.items() <= found.items()
    done = toy.run("evaluate", f"--checkpoint={straight}", "--mask_rates=", f"--config.data.corpus={toy.folder}/more")
    assert done.returncode == 0, done
    assert "by corpus" not in done.stdout, done
    done = toy.run("export", f"--checkpoint={straight}", f"--output={tmp_path / 'exported'}")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"- Text, 75.0% of the rows: text:{toy.text};" in card
    assert f"- Text, 25.0% of the rows: text:{toy.folder / 'more.txt'};" in card
    done = toy.run("audit", *toy.flags(data__corpus=both), "--tokens=2000")
    assert done.returncode == 0, done
    assert "no special token was ever selected" in done.stdout, done
    done = toy.run("plan", *toy.flags(data__corpus=both))
    assert done.returncode == 0, done
    assert "16 rows of 32" in done.stdout, done
