"""Preparing a corpus: nothing lost, the same bytes however it was interrupted or shared out."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from flax_mlm.config.load import build
from flax_mlm.data import prepare as prepare_lib
from flax_mlm.data import sources, writer
from flax_mlm.data.corpus import Corpus
from flax_mlm.errors import UserError

ROOT = Path(__file__).parent.parent


def make_config(**changes):
    """The base config, small; `data_x=1` sets data.x."""
    c = base.get_config()
    c.data.update(seq_len=32, num_workers=1)
    c.tokenizer.vocab_size = 500
    for name, value in changes.items():
        section, _, field = name.partition("_")
        c[section][field] = value
    return build(c)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A file of 300 documents, about a megabyte of prose-like text."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdeghilmnorst"), rng.integers(2, 9))) for _ in range(2000)])
    rank = rng.zipf(1.3, 200_000) % 2000
    documents = np.split(words[rank], np.sort(rng.choice(np.arange(1, 200_000), 299, replace=False)))
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("\n\n".join(" ".join(d) for d in documents))
    return path


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(prepare_lib, "CHUNK", 50_000)
    monkeypatch.setattr(writer, "WINDOW", 100_000)


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as m:
        m.setattr(prepare_lib, "CHUNK", 50_000)
        m.setattr(writer, "WINDOW", 100_000)
        output = tmp_path_factory.mktemp("undisturbed") / "corpus"
        prepare_lib.prepare(make_config(data_source=f"text:{text}"), output, lambda line: None)
        return output


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_no_document_is_lost_and_none_is_in_both_splits(text, undisturbed):
    corpus = Corpus.open(undisturbed)
    corpus.verify()
    tok = corpus.tokenizer()
    documents = text.read_text().split("\n\n")
    held_out = documents[19::20]
    training = [d for i, d in enumerate(documents) if i % 20 != 19]
    for name, expected in (("train", training), ("validation", held_out)):
        rows = corpus.split(name)
        read = rows.read(np.arange(rows.num_rows))
        found = np.sort(read[~tok.is_special[read]])
        np.testing.assert_array_equal(found, np.sort(np.concatenate(tok.encode(expected))))
        counts = corpus.counts[name]
        assert counts["documents"] == len(expected) and counts["tokens"] == len(found)
        assert counts["words"] == len(" ".join(expected).split()) and counts["bytes"] == len("".join(expected))
        assert counts["padding"] / read.size < 0.03
    assert len(list(undisturbed.glob("train-*.npy"))) > 1
    assert sorted(p.name for p in undisturbed.parent.iterdir()) == ["corpus"]


def test_the_tokenizer_has_not_seen_validation_documents(tmp_path):
    documents = ["seen words here " * 30] * 40
    documents[19] = documents[39] = "qqqq zzzz " * 90
    (tmp_path / "a").write_text("\n\n".join(documents))
    config = make_config(data_source=f"text:{tmp_path / 'a'}", tokenizer_vocab_size=285)
    tok = prepare_lib.prepare(config, tmp_path / "out", lambda line: None).tokenizer()
    assert not {p for p in tok.tokens[261:] if set(p) & set("qz")}


def test_two_workers_write_the_same_bytes(text, undisturbed, tmp_path):
    config = make_config(data_source=f"text:{text}", data_num_workers=2)
    prepare_lib.prepare(config, tmp_path / "corpus", lambda line: None)
    assert contents(tmp_path / "corpus") == contents(undisturbed)


SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_prepare as t
if __name__ == "__main__":
    t.prepare_lib.CHUNK, t.writer.WINDOW = 50_000, 100_000
    t.prepare_lib.prepare(t.make_config(data_source={source!r}, data_num_workers=2), sys.argv[1])
"""


@pytest.fixture
def start(text, tmp_path):
    """Starts `prepare` in a process (and session) of its own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), source=f"text:{text}"))
    running = []

    def run(output: Path) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(output)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.wait()


def test_killed_and_started_again(start, undisturbed, tmp_path):
    output, work = tmp_path / "corpus", tmp_path / "corpus.tmp"
    for seen in ("tokenizer-*", "*.npz", "corpus/train-00000.npy"):
        process = start(output)
        deadline = time.monotonic() + 60
        while not list(work.glob(seen)) and time.monotonic() < deadline:
            assert process.poll() is None
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not output.exists()
        while time.monotonic() < deadline:  # its workers leave as well
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.01)
        else:
            pytest.fail("workers outlived their parent")
    process = start(output)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "tokenizer: trained before, used again" in said and "done before and used again" in said
    assert contents(output) == contents(undisturbed) and not work.exists()


def test_two_at_once_make_one(start, undisturbed, tmp_path):
    processes = [start(tmp_path / "corpus") for _ in range(2)]
    said = "".join(p.communicate(timeout=60)[0] for p in processes)
    assert [p.returncode for p in processes] == [0, 0] and said.count("tokenizer: training") == 1
    assert contents(tmp_path / "corpus") == contents(undisturbed) and not (tmp_path / "corpus.tmp").exists()


def test_a_finished_output_is_kept(text, undisturbed, tmp_path):
    said: list[str] = []
    before = contents(undisturbed)
    prepare_lib.prepare(make_config(data_source=f"text:{text}"), undisturbed, said.append)
    assert "already prepared" in said[0] and contents(undisturbed) == before
    for other in ({"data_seq_len": 64}, {"tokenizer_vocab_size": 501}, {"data_packing": "sequential"}):
        with pytest.raises(UserError, match="holds a corpus of other text or settings"):
            prepare_lib.prepare(make_config(data_source=f"text:{text}", **other), undisturbed, said.append)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for taken in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(UserError, match="exists and is not a corpus"):
            prepare_lib.prepare(make_config(data_source=f"text:{text}"), taken, said.append)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_cached_and_with_a_given_tokenizer(text, undisturbed, tmp_path):
    config = make_config(
        data_source=f"text:{text}",
        data_packing="sequential",
        data_cache_dir=str(tmp_path / "cache"),
        tokenizer_path=str(undisturbed),
    )
    corpus = prepare_lib.prepare_cached(config, lambda line: None)
    assert corpus.tokenizer().fingerprint == Corpus.open(undisturbed).tokenizer().fingerprint
    assert corpus.counts["train"]["tokens"] == Corpus.open(undisturbed).counts["train"]["tokens"]
    said: list[str] = []
    assert prepare_lib.prepare_cached(config, said.append).fingerprint == corpus.fingerprint
    assert len(said) == 1 and "already prepared" in said[0]


@pytest.mark.parametrize(
    "content, message",
    [
        ("a\n\nb\n\nc", "data.validation_every is 20, but .* has 3 documents, .* set it to 3 or less"),
        ("a\nb", "is one document"),
        (" \n", "holds no text"),
        ("\n\n".join(["few words"] * 30), r"tokenizer.vocab_size is 500; expected at most \d+"),
        ("\n\n".join(["few words"] * 19 + ["\u200b"]), "its validation documents hold no text"),
    ],
)
def test_text_that_will_not_do(content, message, tmp_path):
    (tmp_path / "a").write_text(content)
    size = 270 if "\u200b" in content else 500
    config = make_config(data_source=f"text:{tmp_path / 'a'}", tokenizer_vocab_size=size)
    with pytest.raises(UserError, match=message):
        prepare_lib.prepare(config, tmp_path / "out", lambda line: None)
    assert not (tmp_path / "out").exists()


def test_what_is_odd_is_said(tmp_path):
    (tmp_path / "a").write_bytes(b"\n\n".join([b"word after word "] * 30) + b"\xff")
    (tmp_path / "b").write_bytes(b"")
    said: list[str] = []
    config = make_config(data_source=f"text:{tmp_path}/?", tokenizer_vocab_size=270)
    prepare_lib.prepare(config, tmp_path / "out", said.append)
    assert "warning: 1 bytes in 1 files were not UTF-8 and became U+FFFD" in said
    assert "warning: 1 empty files" in said and any("licence" in line for line in said)
    assert any(line.startswith("validation: 1 documents, ") and "padding" in line for line in said)


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 200))
def test_sample_is_bounded_and_spread(sizes, limit):
    texts = [f"{i:02d}" + "x" * n for i, n in enumerate(sizes)]
    kept = prepare_lib._sample(iter(texts), limit)
    assert len(kept) == 1 or sum(map(len, kept)) <= limit or not texts
    places = [texts.index(t) for t in kept]
    assert set(np.diff(places)) <= {places[1]} if len(places) > 1 else places in ([], [0])


def test_output_must_be_local():
    with pytest.raises(UserError, match="prepare writes to a local folder"):
        prepare_lib.prepare(make_config(), "gs://bucket/corpus")


def test_chunks_keep_every_part_in_order():
    parts = [sources.TextChunk(0, i // 3, "x" * (i * 7919 % 40_000)) for i in range(50)]
    chunks = list(prepare_lib._chunks(iter(parts)))
    assert [p for c in chunks for p in c] == parts and len(chunks) > 3
    assert Counter(len(c) > 0 for c in chunks) == {True: len(chunks)}
