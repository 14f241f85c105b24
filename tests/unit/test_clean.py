"""Cleaning a source in `prepare`: the same corpus as of the documents that are left, by any number of workers."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flax_mlm.config.load import build
from flax_mlm.configs import base
from flax_mlm.data.corpus import Corpus
from flax_mlm.data.prepare import merge, prepare, prepare_shard
from flax_mlm.data.sources import base as sources
from flax_mlm.data.work import working
from flax_mlm.errors import UserError
from flax_mlm.storage import buckets
from tests.helpers.bucket_servers import serving
from tests.helpers.paths import ROOT

UNIT_BYTES = 20_000
WORDS = ["".join(letters) for letters in itertools.product("bdgklmnprst", "aeiou", "lmnrst")]


def document(number: int) -> str:
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS, rng.integers(40, 120)))


ORIGINALS = [document(i) for i in range(120)]
COPIES = [f"  {ORIGINALS[i]}\n" for i in range(0, 60, 4)]
SIMILAR = [ORIGINALS[i] + " one more word" for i in range(1, 61, 4)]
CONTAMINATED = [f"{document(1000 + i)} {' '.join(document(2000).split()[:15])}" for i in range(5)]


def config_of(folder: Path, **data):
    c = base.get_config()
    c.data.update(seq_len=32, num_workers=1, source=f"lines:{folder}/*.txt", validation_fraction=0.2, **data)
    c.tokenizer.vocab_size = 400
    return build(c)


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", UNIT_BYTES)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Several files of documents, then of those that are to be dropped; and a test set."""
    text = [*ORIGINALS, *(copy.strip() for copy in COPIES), *SIMILAR, *CONTAMINATED]
    for i, part in enumerate(np.array_split(np.array(text, object), 5)):
        (tmp_path / f"{i}.txt").write_text("\n".join(part) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": document(2000), "answer": "short"}) + "\n")
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tokens_of(corpus: Corpus) -> list[bytes]:
    """The documents of short rows, as sets of segments would differ by packing: all tokens, sorted."""
    tokenizer = corpus.tokenizer()
    found = []
    for name in ("train", "validation"):
        rows = corpus.split(name)
        read = rows.read(np.arange(rows.num_rows))
        found.append(np.sort(read[~tokenizer.is_special[read]]).tobytes())
    return found


@pytest.mark.parametrize(("dedup", "left"), [("exact", ORIGINALS + SIMILAR), ("near", ORIGINALS)])
def test_duplicates_and_test_text_are_left_out(folder, tmp_path, dedup, left):
    log: list[str] = []
    config = config_of(folder, dedup=dedup, decontaminate=f"{folder}/test.jsonl")
    corpus = prepare(config, tmp_path / "out", log.append)
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "a.txt").write_text("\n".join(left) + "\n")
    expected = prepare(config_of(tmp_path / "left"), tmp_path / "expected", log.append)
    assert corpus.tokenizer().fingerprint == expected.tokenizer().fingerprint, "it is trained on what is left"
    assert tokens_of(corpus) == tokens_of(expected)
    report = json.loads((tmp_path / "out" / "cleaning.json").read_text())
    assert report["documents"] == len(ORIGINALS) + len(COPIES) + len(SIMILAR) + len(CONTAMINATED)
    assert report["documents_kept"] == len(left)
    near = len(SIMILAR) if dedup == "near" else 0
    assert report["documents_dropped"] == {"exact": len(COPIES), "near": near, "contaminated": len(CONTAMINATED)}
    assert report["tokens_saved"] > 0
    assert len(report["sample_clusters"]) == 10
    first = report["sample_clusters"][0]["members"]
    assert {member["text"][:40] for member in first} == {first[0]["text"][:40]}
    (by_file,) = report["decontamination"]
    assert (by_file["texts_too_short"], by_file["documents_dropped"]) == (1, len(CONTAMINATED))
    assert any(line.startswith(f"cleaning: {len(left)} of {report['documents']} documents are kept") for line in log)


@pytest.fixture
def expected(folder, tmp_path) -> dict[str, bytes]:
    prepare(config_of(folder, dedup="near"), tmp_path / "expected", lambda line: None)
    return content(tmp_path / "expected")


def test_any_number_of_workers_and_shards_make_the_same_bytes(folder, tmp_path, expected):
    config, log = config_of(folder, dedup="near"), list[str]()
    many = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=3))
    prepare(many, tmp_path / "again", log.append)
    assert content(tmp_path / "again") == expected
    for shard in (2, 3, 1):
        prepare_shard(config, tmp_path / "out", shard, 3, log.append)
    assert log[-1] == "shard 1 of 3 is done; after all of them, run it with --merge in place of --shard"
    assert sum("has written its signatures" in line for line in log) == 2
    with pytest.raises(UserError, match=r"units are not made .* run --shard=2/3, --shard=3/3 with the same settings"):
        merge(config, tmp_path / "out", log.append)
    for shard in (3, 2):
        prepare_shard(config, tmp_path / "out", shard, 3, log.append)
    merge(config, tmp_path / "out", log.append)
    assert content(tmp_path / "out") == expected


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from flax_mlm.configs import base
from flax_mlm.config.load import build
from flax_mlm.data.prepare import prepare
from flax_mlm.data.sources import base as sources
if __name__ == "__main__":
    sources.UNIT_BYTES = {unit_bytes}
    c = base.get_config()
    c.data.update(seq_len=32, num_workers=2, source={source!r}, validation_fraction=0.2, dedup="near")
    c.tokenizer.vocab_size = 400
    prepare(build(c), sys.argv[1])
"""


def test_killed_at_each_stage_it_goes_on(folder, tmp_path, expected):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), unit_bytes=UNIT_BYTES, source=f"lines:{folder}/*.txt"))
    for seen in ("*/signatures/0*", "*/dropped.npy", "*/units/00001.json", None):
        process = subprocess.Popen([sys.executable, script, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while seen and not list((tmp_path / "out.tmp").glob(seen)) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.001)
        if seen:
            os.kill(process.pid, signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "units were finished before and are reused" in said
    assert content(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"decontaminate": "nothing/*.jsonl"}, "data.decontaminate has 'nothing/.*no file matches"),
        ({"decontaminate": "a.jsonl,"}, "data.decontaminate is 'a.jsonl,'; a glob beside a comma is empty"),
        ({"dedup": "fuzzy"}, "data.dedup is 'fuzzy'; expected one of none, exact, near"),
        ({"dedup_threshold": 1.5}, "data.dedup_threshold is 1.5"),
    ],
)
def test_wrong_settings(folder, tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        prepare(config_of(folder, **data), tmp_path / "out", print)
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused_in_a_bucket_from_the_first_signature(folder):
    class Killed(BaseException):
        pass

    def run(task, units, log):
        task.do(units[0])
        raise Killed

    with serving("s3") as server:
        output = f"{server.url}/corpus"
        with pytest.raises(Killed):
            prepare(config_of(folder, dedup="near"), output, lambda line: None, run)
        for work in (prepare, merge):
            with pytest.raises(UserError, match=r"corpus\.tmp holds unfinished work of other text or settings"):
                work(config_of(folder, dedup="exact"), output, lambda line: None)
        prepare(config_of(folder, dedup="near"), output, lambda line: None)
        assert not buckets.is_folder(f"{output}.tmp")


def test_what_is_left_behind_is_removed(folder, tmp_path, expected):
    config, output, log = config_of(folder, dedup="near"), tmp_path / "out", list[str]()
    for shard in (1, 2):
        prepare_shard(config, output, shard, 2, log.append)
    (work,) = (path for path in (tmp_path / "out.tmp").iterdir() if path.is_dir())
    of_killed = [work / "writing" / "train-00000.npy.host.1.2", work / "signatures" / ".abc"]
    for file in of_killed:
        file.write_text("half")
    with pytest.raises(UserError, match="units are not made"):
        merge(config, output, log.append)
    assert not [file for file in of_killed if file.exists()]
    prepare(config, output, log.append)
    assert content(output) == expected


@pytest.mark.parametrize("dedup", ["near", "exact"])
def test_a_shard_that_waits_until_the_corpus_is_there_leaves_nothing(folder, tmp_path, expected, dedup):
    output, log, errors = tmp_path / "out", list[str](), list[str]()

    def wait() -> None:
        try:
            prepare_shard(config_of(folder, dedup=dedup), output, 1, 2, log.append)
        except UserError as e:
            errors.append(str(e))

    thread = threading.Thread(target=wait)
    with working(output, "0" * 64, log.append, is_alone=True):
        thread.start()
        while not log:
            time.sleep(0.01)
        shutil.copytree(tmp_path / "expected", output)
    thread.join()
    assert "another process is at work" in log[0]
    refused = f"{output} holds a corpus of other text or settings; name another folder, or delete that one"
    assert (log[1:], errors) == (([f"corpus: {output}, already prepared"], []) if dedup == "near" else ([], [refused]))
    assert not (tmp_path / "out.tmp").exists()
