"""One tokenizer for several sources: bytes in proportion to sizes ** alpha, each source read once, bounded memory."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_mlm.config.load import build
from flax_mlm.config.schema import Config
from flax_mlm.configs import base
from flax_mlm.data import shared_tokenizer
from flax_mlm.data.prepare import prepare
from flax_mlm.data.shared_tokenizer import TextSample, make_tokenizer, sample_sources
from flax_mlm.data.tokenizer import load_tokenizer
from flax_mlm.errors import UserError

LETTERS = {"en": "abcdefghij", "sw": "ｋｌｍｎｏ", "de": "pqrstuvwxy"}  # three bytes a letter in sw


def text_of(language: str, num_words: int) -> str:
    """Documents of ten words in letters of their own."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list(LETTERS[language]), rng.integers(2, 8))) for _ in range(num_words)]
    return "\n\n".join(" ".join(words[i : i + 10]) for i in range(0, num_words, 10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("languages")
    for language, num_words in {"en": 20_000, "sw": 300, "de": 3000}.items():
        (folder / f"{language}.txt").write_text(text_of(language, num_words))
    return folder


def config(folder: Path, languages: str = "en sw de", alpha: float = 0.3, **tokenizer) -> Config:
    c = base.get_config()
    c.data.source = " | ".join(f"text:{folder}/{language}.txt" for language in languages.split())
    c.data.update(sampling_alpha=alpha, num_workers=1, seq_len=32)
    c.tokenizer.update({"vocab_size": 500, "sample_bytes": 20_000, **tokenizer})
    return build(c)


def silent(line: str) -> None:
    pass


# The sample


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=40), st.integers(1, 300))
def test_a_sample_is_whole_where_there_is_room_and_bounded_where_there_is_none(texts, max_bytes):
    sample, largest = TextSample(), 0
    for text in texts:
        sample.add(text, max_bytes)
        largest = max(largest, len(text.encode()))
        assert sample._kept_size < max_bytes + max(largest, 1)
    content = "".join(texts).encode()
    assert sample.size == len(content)
    if 0 < len(content) <= max_bytes:
        assert "".join(sample.texts(len(content))) == "".join(texts)
        assert "".join(sample.texts(2 * len(content))) == 2 * "".join(texts)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.lists(st.integers(1, 400), min_size=1, max_size=5))
def test_thinning_early_or_late_is_the_same(sizes, bounds):
    texts = [chr(ord("a") + i % 26) * n for i, n in enumerate(sizes)]
    bounds = sorted(bounds, reverse=True)
    early, late = TextSample(), TextSample()
    for text in texts:
        early.add(text, bounds[0])
        late.add(text, 10**9)
    for bound in bounds:
        early.thin(bound)
    late.thin(bounds[-1])
    num_bytes = min(bounds[-1], sum(sizes))
    assert list(early.texts(num_bytes)) == list(late.texts(num_bytes))


def test_a_sample_is_spread_over_the_text():
    sample = TextSample()
    for i in range(10_000):
        sample.add(f"{i:010}", 10_000)
    found = np.array([int(text) for text in sample.texts(10_000)])
    assert (np.diff(found) > 0).all()
    assert abs(found.mean() - 5000) < 5 * 10_000 / np.sqrt(12 * 1000)


@pytest.mark.parametrize("alpha", [1.0, 0.7, 0.3])
@pytest.mark.parametrize("max_bytes", [3000, 30_000, 10**9])
def test_bytes_are_in_proportion_to_powers_of_sizes(alpha, max_bytes):
    sizes = {"en": 60_000, "sw": 600, "de": 6000}

    def reader(name: str, size: int):
        return lambda sample: [sample.add(name[0] * 20, max_bytes) for _ in range(size // 20)]

    samples, parts = sample_sources({name: reader(name, size) for name, size in sizes.items()}, alpha, max_bytes)
    assert {name: sample.size for name, sample in samples.items()} == sizes
    powers = np.array([size**alpha for size in sizes.values()])
    total = min(max_bytes, sum(sizes.values()))
    assert list(parts.values()) == pytest.approx(list(total * powers / powers.sum()), abs=1)
    for name, sample in samples.items():
        assert "".join(sample.texts(parts[name])) == parts[name] * name[0]
        assert sample._kept_size <= min(sizes[name], parts[name] + 20)


def test_no_more_than_twice_the_sample_is_kept():
    samples: list[TextSample] = []

    class Watched(TextSample):
        def __init__(self) -> None:
            super().__init__()
            samples.append(self)

        def add(self, text: str, max_bytes: int) -> None:
            super().add(text, max_bytes)
            assert sum(sample._kept_size for sample in samples) <= 2 * 1000 + 100

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_tokenizer, "TextSample", Watched)

        def read(sample: TextSample) -> None:
            for _ in range(500):
                sample.add("0123456789", 1000)

        sample_sources({str(i): read for i in range(10)}, 0.3, 1000)


# The folder


def test_small_sources_have_more_tokens_at_a_lower_alpha(folder, tmp_path):
    found = {}
    for alpha in (1.0, 0.3):
        lines: list[str] = []
        make_tokenizer(config(folder, alpha=alpha), tmp_path / str(alpha), lines.append)
        about = json.loads((tmp_path / str(alpha) / "sources.json").read_text())
        assert about["sampling_alpha"] == alpha
        found[alpha] = about["sources"][f"text:{folder}/sw.txt"]
        sizes = np.array([each["bytes"] for each in about["sources"].values()], float)
        parts = [each["sample_bytes"] for each in about["sources"].values()]
        assert parts == pytest.approx(list(sum(parts) * sizes**alpha / (sizes**alpha).sum()), rel=0.01, abs=2)
        (line,) = (line for line in lines if line.startswith(f"    text:{folder}/sw.txt"))
        assert f"{found[alpha]['fraction']:.1%} of the sample" in line
        assert f"tokens/word {found[alpha]['tokens_per_word']:.3f}" in line
    assert found[0.3]["fraction"] > 3 * found[1.0]["fraction"]
    assert found[0.3]["tokens_per_word"] < 0.8 * found[1.0]["tokens_per_word"]


def test_the_same_sources_give_the_same_bytes_and_corpora_share_them(folder, tmp_path):
    first = make_tokenizer(config(folder), tmp_path / "first", silent)
    second = make_tokenizer(config(folder), tmp_path / "second", silent)
    assert first.content == second.content
    assert load_tokenizer(tmp_path / "first").fingerprint == first.fingerprint
    assert not list(tmp_path.glob("*.tmp"))
    for language in ("en", "sw"):
        c = config(folder, language, path=str(tmp_path / "first"))
        assert prepare(c, tmp_path / language, silent).tokenizer().fingerprint == first.fingerprint


def test_what_is_made_is_not_made_again(folder, tmp_path):
    lines: list[str] = []
    make_tokenizer(config(folder), tmp_path / "made", silent)
    before = (tmp_path / "made" / "tokenizer.model").stat().st_mtime_ns
    make_tokenizer(config(folder), tmp_path / "made", lines.append)
    assert lines == [f"tokenizer: {tmp_path}/made, already made"]
    assert (tmp_path / "made" / "tokenizer.model").stat().st_mtime_ns == before


def test_of_a_large_source_the_beginning_is_read_and_its_size_estimated(tmp_path):
    (tmp_path / "en.txt").write_text(text_of("en", 100_000))
    make_tokenizer(config(tmp_path, "en", sample_bytes=4000, vocab_size=300), tmp_path / "made", silent)
    about = json.loads((tmp_path / "made" / "sources.json").read_text())["sources"][f"text:{tmp_path}/en.txt"]
    assert about["bytes"] == pytest.approx(0.95 * (tmp_path / "en.txt").stat().st_size, rel=0.15)


def test_held_out_documents_are_not_read(folder, tmp_path):
    for fraction in (0.05, 0.9):
        c = config(folder)
        c = dataclasses.replace(c, data=dataclasses.replace(c.data, validation_fraction=fraction))
        make_tokenizer(c, tmp_path / str(fraction), silent)
    found = [json.loads((tmp_path / str(f) / "sources.json").read_text())["sources"] for f in (0.05, 0.9)]
    name = f"text:{folder}/en.txt"
    assert found[1][name]["bytes"] < 0.3 * found[0][name]["bytes"]


def other_settings(folder: Path, output: Path) -> None:
    make_tokenizer(config(folder), output, silent)
    make_tokenizer(config(folder, alpha=0.5), output, silent)


def other_folder(folder: Path, output: Path) -> None:
    output.mkdir()
    (output / "mine.txt").touch()
    make_tokenizer(config(folder), output, silent)


def other_temporary_folder(folder: Path, output: Path) -> None:
    (output.with_name("out.tmp")).mkdir()
    (output.with_name("out.tmp") / "mine.txt").touch()
    make_tokenizer(config(folder), output, silent)


def no_text(folder: Path, output: Path) -> None:
    (output.parent / "sw.txt").write_text("\n\n")
    (output.parent / "en.txt").write_text(text_of("en", 1000))
    make_tokenizer(config(output.parent, "en sw"), output, silent)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (other_settings, "out holds a tokenizer of other text or settings; name another folder"),
        (other_folder, "out exists and is no tokenizer of several sources; name another folder"),
        (other_temporary_folder, "out.tmp is not ours, and would be overwritten; move it away"),
        (
            lambda f, o: make_tokenizer(config(f, model_type="symbols"), o),
            "expected bpe or unigram with --tokenizer_only",
        ),
        (no_text, "sw.txt' has no training text; leave it out"),
        (lambda f, o: make_tokenizer(config(f, "en sw en"), o), "en.txt' twice; name it once"),
        (lambda f, o: make_tokenizer(config(f, "en fr"), o), "no file matches"),
        (
            lambda f, o: make_tokenizer(config(f, path="x"), o),
            "tokenizer.path is 'x', and --tokenizer_only trains a new",
        ),
        (
            lambda f, o: make_tokenizer(config(f, vocab_size=90_000), o, silent),
            "tokenizer.vocab_size is 90000; expected",
        ),
    ],
)
def test_what_cannot_be_is_one_line(folder, tmp_path, act, said):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        act(folder, tmp_path / "out")
    assert "\n" not in str(error.value)
