"""Datasets of Hugging Face: from a folder, from the cache, and from a hub, which answers as the real one does."""

import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from flax_mlm.data.corpus import Corpus
from flax_mlm.data.sources import base
from flax_mlm.data.sources.open import open_source
from flax_mlm.errors import UserError
from tests.helpers import same_documents
from tests.helpers.fake_hub import TOKEN, FakeHub
from tests.helpers.paths import ROOT

datasets = pytest.importorskip("datasets", reason="datasets is not installed (launch/hf-requirements.txt)")

UNIT_BYTES = 60_000

# The libraries read their environment when they are imported, so each test of the hub is a process of its own.
_START = f"""
import json, pickle, sys, time
from flax_mlm.data.sources import base
base.UNIT_BYTES = {UNIT_BYTES}
"""
_READ = f"""{_START}
from flax_mlm.data.sources.open import open_source
from flax_mlm.errors import UserError
def read(spec):
    try:
        source = open_source(spec)
        units = pickle.loads(pickle.dumps(source.units))
        texts = [[chunk.text for chunk in unit.chunks()] for unit in reversed(units)]
        return dict(units=texts[::-1], version=source.version, name=source.name, licence=source.licence)
    except UserError as e:
        return dict(error=str(e))
print(json.dumps([read(spec) for spec in sys.argv[1:]]))
"""
# Waits are a hundredth of what they are; their sum is the last line of errors.
_PREPARE = f"""{_START}
import atexit
from flax_mlm.config.load import build
from flax_mlm.configs import base as config
from flax_mlm.data.prepare import prepare
from flax_mlm.errors import UserError
slept, sleep, speed = [], time.sleep, float(sys.argv[3])
def faster(seconds):
    slept.append(seconds)
    sleep(seconds / speed)
time.sleep = faster
c = config.get_config()
c.data.update(source=sys.argv[1], seq_len=32, num_workers=1)
c.tokenizer.vocab_size = 400
try:
    prepare(build(c), sys.argv[2], lambda line: print(line, flush=True))
except UserError as e:
    print(e, sum(slept), sep="\\n", file=sys.stderr)
    sys.exit(e.code)
"""


def documents(n: int = 600) -> list[str]:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdeghilmnorst"), rng.integers(2, 9))) for _ in range(2000)]
    texts = (" ".join(rng.choice(words, rng.integers(5, 90))) for _ in range(n))
    return [f"{text}\n\nnumber {i}" if i % 7 else f"Ä{i} {text}" for i, text in enumerate(texts)]


DOCUMENTS = documents()


def parquet(texts: list[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    titles = [f"title {i}" for i in range(len(texts))]
    nested = [{"body": text, "n": i} for i, text in enumerate(texts)]
    table = pa.table({"id": list(range(len(texts))), "text": texts, "title": titles, "inner": nested})
    pq.write_table(table, buffer, row_group_size=40)
    return buffer.getvalue()


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


CARD = b"""---
license: cc0-1.0
configs:
- config_name: first
  data_files: a/*.jsonl
- config_name: second
  data_files:
  - split: train
    path: b/*.jsonl
  - split: held
    path: a/*.jsonl
---
"""


@pytest.fixture
def hub():
    with FakeHub() as hub:
        files = {f"data/train-{i:05d}-of-00003.parquet": parquet(DOCUMENTS[200 * i : 200 * (i + 1)]) for i in range(3)}
        hub.put("org/name", {**files, "data/test-00000-of-00001.parquet": parquet(["one test"])})
        hub.put("org/lines", {"README.md": CARD, "a/x.jsonl": lines(["a"]), "b/x.jsonl": lines(["b", "c"])})
        yield hub


def environment(changes: dict[str, str]) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if not name.startswith("HF_")}, **changes}


def run(script: str, *args: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, env=environment(env), cwd=ROOT, capture_output=True, text=True, timeout=120)


def read(*specs: str, env: dict[str, str]) -> list[dict]:
    result = run(_READ, *specs, env=env)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def texts(result: dict) -> list[str]:
    assert "error" not in result, result
    return list(itertools.chain(*result["units"]))


def prepared(spec: str, output: Path, env: dict[str, str] | None = None) -> dict[str, bytes]:
    result = run(_PREPARE, spec, output, 1, env=env or {})
    assert result.returncode == 0, result.stderr
    return contents(output)


def contents(output: Path) -> dict[str, bytes]:
    """All of a corpus."""
    assert Corpus.open(output).counts["train"]["rows"]
    return {path.name: path.read_bytes() for path in output.iterdir()}


def corpus(spec: str, folder: Path, env: dict[str, str]) -> dict[str, str]:
    """The digest of each file of rows."""
    script = "import json, sys; from pathlib import Path; from tests.helpers.same_documents import corpus_of\n"
    script += "print(json.dumps(corpus_of(sys.argv[1], Path(sys.argv[2]))))"
    result = run(script, spec, folder, env=env)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# ---- folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    titles = [f"title {i}" for i in range(len(DOCUMENTS))]
    nested = [{"body": text} for text in DOCUMENTS]
    numbers = list(range(len(DOCUMENTS)))
    train = datasets.Dataset.from_dict({"text": DOCUMENTS, "title": titles, "inner": nested, "number": numbers})
    test = datasets.Dataset.from_dict({"only": ["one", "", None, "two"], "n": [1, 2, 3, 4]})
    train.save_to_disk(folder / "one", num_shards=3)
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder / "several")
    train.shuffle(seed=1).save_to_disk(folder / "shuffled")
    return folder


def chunks(spec: str) -> tuple[list[str], Counter]:
    counts: Counter = Counter()
    return [chunk.text for chunk in open_source(spec).chunks(counts)], counts


@pytest.mark.parametrize("name", ["one", "several", "several?split=train", "one#text", "one#inner.body"])
def test_a_saved_folder_is_read_in_order(saved, name):
    found, counts = chunks(f"hf:{saved}/{name}")
    assert found == DOCUMENTS
    assert counts["read"] == open_source(f"hf:{saved}/{name}").size


def test_a_template_joins_columns(saved):
    found, _ = chunks(rf"hf:{saved}/one#{{title}}\n{{text}}")
    assert found == [f"title {i}\n{text}" for i, text in enumerate(DOCUMENTS)]


def test_the_only_column_of_text_is_taken_and_what_has_no_text_is_counted(saved):
    found, counts = chunks(f"hf:{saved}/several?split=test")
    assert found == ["one", "two"]
    assert (counts["null_documents"], counts["empty_documents"]) == (1, 1)


def test_ranges_of_rows_can_be_read_anywhere_and_in_any_order(saved, monkeypatch):
    monkeypatch.setattr(base, "UNIT_BYTES", UNIT_BYTES)
    source = open_source(f"hf:{saved}/one")
    assert len(source.units) > 3
    assert all(unit.size <= UNIT_BYTES for unit in source.units)
    units = pickle.loads(pickle.dumps(source.units))
    found = [[chunk.text for chunk in unit.chunks()] for unit in reversed(units)]
    assert list(itertools.chain(*reversed(found))) == DOCUMENTS


def test_the_version_of_a_folder_changes_with_its_content_and_not_with_its_path(saved, tmp_path):
    version = open_source(f"hf:{saved}/one").version
    (saved / "one").rename(tmp_path / "moved")
    assert open_source(f"hf:{tmp_path}/moved").version == version
    (tmp_path / "moved").rename(saved / "one")
    assert open_source(f"hf:{saved}/shuffled").version != version
    assert open_source(f"hf:{saved}/one#title").version != version


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("several?split=x", "no split 'x'; it has train, test; name one: .*several.split=train"),
        ("one?split=x", "is one split; leave split=x out"),
        ("one?config=x", "which has no config"),
        ("one?colour=x", "'colour=x' is none of config, split, revision"),
        ("one#x", "no column 'x'; it has text, title, inner.body, number"),
        ("one#number", "'number' of int64; expected text"),
        ("one#{title", "brace"),
        ("", "no folder made by save_to_disk; .* parquet:GLOB#column"),
        ("nowhere", "is no folder"),
    ],
)
def test_wrong_folders(saved, rest, message):
    with pytest.raises(UserError, match=message) as e:
        open_source(f"hf:{saved}/{rest}")
    assert "\n" not in str(e.value)


def test_a_damaged_folder_is_named(tmp_path):
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "a")
    (file,) = (tmp_path / "a").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=r"data.source is 'hf:.*/a'; it cannot be read: .*copy or download them"):
        open_source(f"hf:{tmp_path}/a")


def test_the_package_is_optional(tmp_path):
    (tmp_path / "datasets.py").write_text("raise ImportError('No module named datasets')")
    (result,) = read("hf:org/name", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert "pip install 'datasets" in result["error"]
    assert "\n" not in result["error"]


# ---- the hub


def test_a_dataset_of_the_hub_is_read_in_order_by_several_units(hub, tmp_path):
    specs = ["hf:org/name", "hf:org/name#inner.body", "hf:org/name?split=test", "hf:org/lines?config=second"]
    whole, inner, test, second = read(*specs, env=hub.env(tmp_path))
    assert texts(whole) == texts(inner) == DOCUMENTS
    assert len(whole["units"]) > 3
    assert (texts(test), texts(second)) == (["one test"], ["b", "c"])
    assert second["licence"] == "cc0-1.0"
    assert not list((tmp_path / "datasets").glob("*/*")), "nothing is copied to disk"


def test_what_is_wrong_is_one_line_that_lists_what_there_is(hub, tmp_path):
    hub.put("org/script", {"script.py": b"import datasets"})
    hub.put("org/empty", {"README.md": b"nothing"})
    hub.put("org/damaged", {"train.parquet": parquet(DOCUMENTS)[:-500] + b"PAR1"})
    hub.put("org/gated", {"train.jsonl": lines(["secret"])})
    hub.put("org/private", {"train.jsonl": lines(["secret"])})
    hub.closed |= {"org/gated": "gated", "org/private": "private"}
    expected = {
        "hf:org/nothing": "has no dataset 'org/nothing' that you may read; check the name, or set HF_TOKEN",
        "hf:org/name?split=x": "no split 'x'; it has train, test; name one: org/name?split=train",
        "hf:org/name?config=x": "no config 'x'; it has default",
        "hf:org/lines": "several configs; it has first, second; name one: ?config=first",
        "hf:org/lines?config=x": "no config 'x'; it has first, second",
        "hf:org/name?revision=x": "no revision 'x'; it has main, and commits",
        "hf:org/name#x": "no column 'x'; it has id, text, title, inner.body, inner.n",
        "hf:org/script": "a script, which datasets no longer runs; read the hub's Parquet copy",
        "hf:org/empty": "doesn't contain any data files",
        "hf:org/damaged": "it cannot be read: ",
        "hf:org/gated": "gated or private; set HF_TOKEN",
        "hf:org/private": "set HF_TOKEN if it is private",
    }
    for (spec, message), result in zip(expected.items(), read(*expected, env=hub.env(tmp_path)), strict=True):
        assert message in result["error"], spec
        assert "\n" not in result["error"], spec
    for result in read("hf:org/gated", "hf:org/private", env=hub.env(tmp_path / "other", HF_TOKEN=TOKEN)):
        assert texts(result) == ["secret"]


def test_a_new_commit_is_another_corpus_and_an_old_one_can_be_named(hub, tmp_path):
    (old,) = read("hf:org/lines?config=second", env=hub.env(tmp_path))
    files = {"README.md": CARD, "a/x.jsonl": lines(["a"]), "b/x.jsonl": lines(["b", "d"])}
    hub.put("org/lines", files)
    commit = old["version"][4]
    new, named = read(*(f"hf:org/lines?config=second{r}" for r in ("", f"&revision={commit}")), env=hub.env(tmp_path))
    assert texts(new) == ["b", "d"]
    assert new["version"] != old["version"]
    assert named == old


def test_the_same_documents_make_the_same_corpus_as_plain_text(hub, tmp_path):
    expected = same_documents.expected_corpus(tmp_path / "text")
    texts = list(same_documents.documents())
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved", num_shards=3)
    assert same_documents.corpus_of(f"hf:{tmp_path}/saved", tmp_path / "folder") == expected
    hub.put("org/same", {"a.parquet": parquet(texts[:2000]), "b.parquet": parquet(texts[2000:])})
    env = hub.env(tmp_path / "home")
    assert corpus("hf:org/same", tmp_path / "hub", env) == expected
    assert run("import datasets; datasets.load_dataset('org/same')", env=env).returncode == 0
    assert corpus("hf:org/same", tmp_path / "cache", {**env, "HF_HUB_OFFLINE": "1"}) == expected


# ---- the cache


def test_the_cache_is_read_offline(hub, tmp_path):
    env = hub.env(tmp_path / "home")
    fill = (
        "import datasets\nfor name, config in [('org/name', None), ('org/lines', 'first'), ('org/lines', 'second')]:\n"
        "    datasets.load_dataset(name, config)"
    )
    assert run(fill, env=env).returncode == 0
    (online,) = read("hf:org/name", env=env)
    hub.stop()
    commit = hub.refs["org/name"]["main"]
    expected = {
        "hf:org/lines": "several configs; it has first, second",
        "hf:org/other": "it is not in the cache (",
        "hf:org/name?revision=x": f"has {commit}; name one",
        "hf:org/name?split=x": "it has train, test",
    }
    good = ["hf:org/name", f"hf:org/name?revision={commit}", "hf:org/lines?config=second&split=held"]
    whole, named, held, *wrong = read(*good, *expected, env={**env, "HF_HUB_OFFLINE": "1"})
    assert whole == named == online
    assert texts(whole) == DOCUMENTS
    assert len(whole["units"]) > 3
    assert texts(held) == ["a"]
    for message, result in zip(expected.values(), wrong, strict=True):
        assert message in result["error"]
    assert read("hf:org/name", env={**env, "HF_DATASETS_OFFLINE": "1"})[0] == online


def test_a_cache_of_local_files_is_read(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(DOCUMENTS))
    env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    assert run("import datasets, sys; datasets.load_dataset(sys.argv[1])", folder, env=env).returncode == 0
    (result,) = read("hf:texts", env=env)
    assert texts(result) == DOCUMENTS


# ---- a hub that fails, and processes that are killed


def big_hub() -> FakeHub:
    hub = FakeHub()
    hub.put("org/name", {"train-0.parquet": parquet(DOCUMENTS[:300]), "train-1.parquet": parquet(DOCUMENTS[300:])})
    return hub


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict[str, bytes], int]:
    """The corpus, and the bytes of files that were sent for it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with big_hub() as hub:
        return prepared("hf:org/name", folder / "corpus", hub.env(folder / "home")), hub.sent


def test_a_hub_that_does_not_answer_is_said_within_a_minute(tmp_path):
    with big_hub() as hub:
        env = hub.env(tmp_path / "home")
    result = run(_PREPARE, "hf:org/name", tmp_path / "corpus", 100, env=env)
    message, waited = result.stderr.splitlines()
    assert result.returncode == 2
    assert "does not answer" in message
    assert "HF_ENDPOINT" in message
    assert float(waited) < 60


def test_a_hub_that_stops_midway_is_said_and_the_next_run_goes_on(tmp_path, undisturbed):
    expected, sent = undisturbed
    with big_hub() as hub:
        hub.max_bytes = sent * 9 // 10
        env = hub.env(tmp_path / "home")
        result = run(_PREPARE, "hf:org/name", tmp_path / "corpus", 100, env=env)
        message, waited = result.stderr.splitlines()
        assert result.returncode == 2
        assert "does not answer" in message
        assert float(waited) < 60
        assert list((tmp_path / "corpus.tmp").glob("*/units/*.json"))
        hub.max_bytes = None
        hub.start()
        assert prepared("hf:org/name", tmp_path / "corpus", env) == expected


def test_a_hub_that_is_away_for_a_moment_costs_nothing(tmp_path, undisturbed):
    expected, sent = undisturbed
    with big_hub() as hub:
        hub.max_bytes = sent * 9 // 10

        def restart() -> None:
            while hub.is_up:
                time.sleep(0.05)
            time.sleep(1)
            hub.max_bytes = None
            hub.start()

        thread = threading.Thread(target=restart, daemon=True)
        thread.start()
        assert prepared("hf:org/name", tmp_path / "corpus", hub.env(tmp_path / "home")) == expected
        thread.join()


def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path, undisturbed):
    expected, _ = undisturbed
    with big_hub() as hub:
        hub.delay = 0.1
        env = hub.env(tmp_path / "home")
        command = [sys.executable, "-c", _PREPARE, "hf:org/name", str(tmp_path / "corpus"), "1"]
        with subprocess.Popen(command, env=environment(env), cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            while len(list((tmp_path / "corpus.tmp").glob("*/units/*.json"))) < 2:
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        assert not (tmp_path / "corpus").exists()
        hub.delay = 0
        assert prepared("hf:org/name", tmp_path / "corpus", env) == expected
