"""Preparing a corpus: nothing lost, the same bytes however it was interrupted or shared out."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_mlm.data import tokenising, tokenizer_training, work
from flax_mlm.data.corpus import Corpus
from flax_mlm.data.prepare import prepare
from flax_mlm.data.sources import base as sources
from flax_mlm.data.sources.base import TextChunk, hashed
from flax_mlm.errors import UserError
from tests.helpers import preparing, tokenizer_files
from tests.helpers.paths import ROOT


def make_config(**changes):
    """The base config, small; `data_x=1` sets data.x."""
    return preparing.config({name.replace("_", ".", 1): value for name, value in changes.items()})


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


UNIT_BYTES, JOB_CHARS = 300_000, 50_000


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", UNIT_BYTES)
    monkeypatch.setattr(tokenising, "JOB_CHARS", JOB_CHARS)


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sources, "UNIT_BYTES", UNIT_BYTES)
        m.setattr(tokenising, "JOB_CHARS", JOB_CHARS)
        output = tmp_path_factory.mktemp("undisturbed") / "corpus"
        prepare(make_config(data_source=f"text:{text}"), output, silent)
        return output


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def split_by_hash(documents: list[str], fraction: float = 0.05) -> dict[str, list[str]]:
    chunks = list(hashed(TextChunk(0, i, document) for i, document in enumerate(documents)))
    return {
        "train": [chunk.text for chunk in chunks if chunk.hash >= fraction],
        "validation": [chunk.text for chunk in chunks if chunk.hash < fraction],
    }


def test_no_document_is_lost_and_none_is_in_both_splits(text, undisturbed):
    corpus = Corpus.open(undisturbed)
    tok = corpus.tokenizer()
    for name, expected in split_by_hash(text.read_text().split("\n\n")).items():
        rows = corpus.split(name)
        read = rows.read(np.arange(rows.num_rows))
        tokens = np.sort(read[~tok.is_special[read]])
        np.testing.assert_array_equal(tokens, np.sort(np.concatenate(tok.encode(expected))))
        counts = corpus.counts[name]
        assert counts["documents"] == len(expected)
        assert counts["tokens"] == len(tokens)
        assert counts["words"] == len(" ".join(expected).split())
        assert counts["bytes"] == len("".join(expected))
        assert counts["padding"] / read.size < 0.03
    assert sorted(p.name for p in undisturbed.parent.iterdir()) == ["corpus"]


def test_each_unit_is_packed_by_itself(text, undisturbed):
    """The shards of unit K hold the documents that begin in the K-th 300,000 bytes of the file."""
    tok = Corpus.open(undisturbed).tokenizer()
    documents = text.read_text().split("\n\n")
    offsets = np.cumsum([0] + [len(document) + 2 for document in documents[:-1]])
    assert offsets[-1] > 3 * UNIT_BYTES
    for unit in range(offsets[-1] // UNIT_BYTES + 1):
        own = [d for d, offset in zip(documents, offsets, strict=True) if offset // UNIT_BYTES == unit]
        for name, expected in split_by_hash(own).items():
            rows = np.load(undisturbed / f"{name}-{unit:05d}.npy")
            tokens = np.sort(rows[~tok.is_special[rows]])
            np.testing.assert_array_equal(tokens, np.sort(np.concatenate(tok.encode(expected))))


def test_the_tokenizer_has_not_seen_validation_documents(tmp_path):
    seen = split_by_hash([f"seen words here {'a' * i} " * 30 for i in range(40)])["train"]
    unseen = split_by_hash([f"qqqq zzzz {'a' * i} " * 90 for i in range(200)])["validation"]
    assert unseen
    (tmp_path / "a").write_text("\n\n".join(seen + unseen))
    config = make_config(data_source=f"text:{tmp_path / 'a'}", tokenizer_vocab_size=285)
    tok = prepare(config, tmp_path / "out", silent).tokenizer()
    assert not {token for token in tok.tokens[261:] if set(token) & set("qz")}


def test_two_workers_write_the_same_bytes(text, undisturbed, tmp_path):
    config = make_config(data_source=f"text:{text}", data_num_workers=2)
    prepare(config, tmp_path / "corpus", silent)
    assert contents(tmp_path / "corpus") == contents(undisturbed)


SCRIPT = """
import sys
sys.modules |= dict.fromkeys(["jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "tensorflow_datasets"])
sys.path.insert(0, {root!r})
from flax_mlm.configs import base
from flax_mlm.config.load import build
from flax_mlm.data import tokenising
from flax_mlm.data.prepare import prepare
from flax_mlm.data.sources import base as sources
if __name__ == "__main__":
    sources.UNIT_BYTES, tokenising.JOB_CHARS = {unit_bytes}, {job_chars}
    c = base.get_config()
    c.data.update(seq_len=32, num_workers=2, source={source!r})
    c.tokenizer.vocab_size = 500
    prepare(build(c), sys.argv[1])
"""


@pytest.fixture
def start(text, tmp_path):
    """Starts `prepare`, without jax and tensorflow, in a process (and session) of its own."""
    script = tmp_path / "script.py"
    settings = {"root": str(ROOT), "unit_bytes": UNIT_BYTES, "job_chars": JOB_CHARS, "source": f"text:{text}"}
    script.write_text(SCRIPT.format(**settings))
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
    for seen in ("*/tokenizer", "*/units/00001.json"):
        process = start(output)
        deadline = time.monotonic() + 60
        while not list(work.glob(seen)) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
        while time.monotonic() < deadline:  # its workers leave as well
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.01)
        else:
            pytest.fail("workers outlived their parent")
    process = start(output)
    log, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "tokenizer: made before, used again" in log
    assert "units were finished before and are reused" in log
    assert contents(output) == contents(undisturbed)
    assert not work.exists()


def test_two_at_once_make_one_without_jax_or_tensorflow(start, undisturbed, tmp_path):
    processes = [start(tmp_path / "corpus") for _ in range(2)]
    log = "".join(p.communicate(timeout=60)[0] for p in processes)
    assert [p.returncode for p in processes] == [0, 0]
    assert log.count("tokenizer: training") == 1
    assert contents(tmp_path / "corpus") == contents(undisturbed)
    assert not (tmp_path / "corpus.tmp").exists()


def test_a_finished_output_is_kept(text, undisturbed, tmp_path):
    log: list[str] = []
    before = contents(undisturbed)
    prepare(make_config(data_source=f"text:{text}"), undisturbed, log.append)
    assert "already prepared" in log[0]
    assert contents(undisturbed) == before
    for other in (
        {"data_seq_len": 64},
        {"tokenizer_vocab_size": 501},
        {"data_packing": "sequential"},
        {"data_validation_fraction": 0.06},
    ):
        with pytest.raises(UserError, match="holds a corpus of other text or settings"):
            prepare(make_config(data_source=f"text:{text}", **other), undisturbed, silent)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for taken in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(UserError, match="exists and is not a corpus"):
            prepare(make_config(data_source=f"text:{text}"), taken, silent)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_folder_of_another_name_and_owner_is_not_removed(text, tmp_path):
    (tmp_path / "corpus.tmp").mkdir()
    (tmp_path / "corpus.tmp" / "thesis.txt").write_text("x")
    with pytest.raises(
        UserError, match=r"corpus.tmp/thesis.txt is not ours, and its folder is for unfinished work; move"
    ):
        prepare(make_config(data_source=f"text:{text}"), tmp_path / "corpus", silent)
    assert (tmp_path / "corpus.tmp" / "thesis.txt").read_text() == "x"


def test_cached_and_with_a_given_tokenizer(text, undisturbed, tmp_path):
    config = make_config(
        data_source=f"text:{text}",
        data_packing="sequential",
        data_cache_dir=str(tmp_path / "cache"),
        tokenizer_path=str(undisturbed),
    )
    corpus = prepare(config, log=silent)
    assert corpus.tokenizer().fingerprint == Corpus.open(undisturbed).tokenizer().fingerprint
    assert corpus.counts["train"]["tokens"] == Corpus.open(undisturbed).counts["train"]["tokens"]
    log: list[str] = []
    assert prepare(config, log=log.append).fingerprint == corpus.fingerprint
    assert len(log) == 1
    assert "already prepared" in log[0]


# Held-out documents without tokens, and one to train on.
EMPTY = split_by_hash(["\u200b" * i for i in range(1, 100)])["validation"]
EMPTY += split_by_hash(["few words", "some words"])["train"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("a\n\nb\n\nc", r"validation_fraction is 0.05, which holds out none of the 3 documents .* set it to 0\.\d+"),
        ("a\nb", r"is one document, .* \(a blank line ends a document; lines:GLOB takes each line as one\)"),
        ("a\nb\n\na\nb", "is 2 copies of one document"),
        (" \n", "holds no text"),
        ("\n\n".join(f"few words {'a' * i}" for i in range(99)), r"vocab_size is 500; expected at most \d+"),
        (
            "\n\n".join(EMPTY),
            "its validation documents hold no text",
        ),
    ],
)
def test_text_that_will_not_do(content, message, tmp_path):
    (tmp_path / "a").write_text(content)
    size = 270 if "\u200b" in content else 500
    config = make_config(data_source=f"text:{tmp_path / 'a'}", tokenizer_vocab_size=size)
    with pytest.raises(UserError, match=message):
        prepare(config, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


def test_odd_text_is_reported(tmp_path):
    documents = [f"word after word {'a' * i}" for i in range(99)]
    (tmp_path / "a").write_bytes("\n\n".join(documents).encode() + b"\xff")
    (tmp_path / "b").write_bytes(b"")
    log: list[str] = []
    config = make_config(data_source=f"text:{tmp_path}/?", tokenizer_vocab_size=270)
    prepare(config, tmp_path / "out", log.append)
    damaged = f"warning: 1 bytes in 1 files could not be decoded and became U+FFFD, most in {tmp_path}/a; "
    assert any(line.startswith(damaged) for line in log)
    assert f"warning: 1 empty files, most in {tmp_path}/b" in log
    assert any("licence" in line for line in log)
    held_out = len(split_by_hash([*documents[:-1], documents[-1] + "\ufffd"])["validation"])
    assert any(line.startswith(f"validation: {held_out} documents, ") and "padding" in line for line in log)


@pytest.mark.parametrize("documents, warned", [(40, True), (4000, False)])
def test_text_without_tokens_is_reported_with_its_file(documents, warned, tmp_path):
    for name, words, count in (("a", ("the ", "and "), documents), ("b", ("的 ", "一 "), 40)):
        texts = ("".join(words[int(bit)] for bit in f"{i:012b}") for i in range(count))
        (tmp_path / name).write_text("\n\n".join(texts))
    log: list[str] = []
    path = tokenizer_files.folder(tmp_path / "tokenizer", tokenizer_files.bert())
    config = make_config(data_source=f"text:{tmp_path}/?", tokenizer_path=str(path))
    prepare(config, tmp_path / "out", log.append)
    (line,) = [line for line in log if line.startswith("text: ")]
    assert re.fullmatch(r"text: \d+\.\d\d% of the tokens are unknown, 0\.00% of the bytes could not be decoded", line)
    assert any(line.startswith("warning") for line in log) == warned
    where = f"of the text, which becomes [UNK], most in {tmp_path}/b; use a tokenizer"
    assert any(where in line for line in log) == warned


def test_unknown_tokens_of_units_that_were_finished_before_count(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)
    (tmp_path / "a").write_text("\n\n".join(f"的 一 是 {'不 ' * i}" for i in range(40)))
    path = tokenizer_files.folder(tmp_path / "tokenizer", tokenizer_files.bert())
    config = make_config(data_source=f"text:{tmp_path}/a", tokenizer_path=str(path))
    log: list[str] = []
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(work, "write_manifest", interrupt)
        prepare(config, tmp_path / "out", silent)
    prepare(config, tmp_path / "out", log.append)
    assert any("units were finished before" in line for line in log)
    assert "text: 100.00% of the tokens are unknown, 0.00% of the bytes could not be decoded" in log


def interrupt(*_):
    raise KeyboardInterrupt


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 200))
def test_sample_is_bounded_and_spread(sizes, limit):
    texts = [f"{i:02d}" + "x" * n for i, n in enumerate(sizes)]
    kept = tokenizer_training.thinned(iter(texts), limit)
    assert len(kept) == 1 or sum(map(len, kept)) <= limit or not texts
    places = [texts.index(t) for t in kept]
    assert set(np.diff(places)) <= {places[1]} if len(places) > 1 else places in ([], [0])


def test_jobs_keep_every_chunk_in_order_and_end_with_their_unit():
    chunks = [TextChunk(i // 20, i // 3, "x" * (i * 7919 % 40_000)) for i in range(50)]
    jobs = list(tokenising.make_jobs(iter(chunks)))
    assert [chunk[:3] for job in jobs for chunk in job] == [chunk[:3] for chunk in chunks]
    assert len(jobs) > 3
    for job in jobs:
        assert len({chunk.unit for chunk in job}) == 1
