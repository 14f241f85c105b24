"""The same documents in every format are the same corpus, however `prepare` is interrupted."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from flax_mlm.data.prepare import prepare
from flax_mlm.data.sources import base
from flax_mlm.data.sources.open import open_source
from flax_mlm.errors import UserError
from tests.helpers import same_documents
from tests.helpers.paths import ROOT
from tests.helpers.same_documents import corpus_of, documents, expected_corpus, read_documents

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def table(texts) -> pa.Table:
    nested = [{"body": text, "number": i} for i, text in enumerate(texts)]
    return pa.table({"id": list(range(len(texts))), "text": list(texts), "a.b": list(texts), "nested": nested})


def parquet(texts, file: Path, **options) -> None:
    pq.write_table(table(texts), file, **({"row_group_size": 700} | options))


def arrow_stream(texts, file: Path, **options) -> None:
    content = table(texts)
    with pa.ipc.new_stream(file, content.schema, **options) as writer:
        writer.write_table(content, max_chunksize=300)


def arrow_file(texts, file: Path, **options) -> None:
    content = table(texts)
    with pa.ipc.new_file(file, content.schema, **options) as writer:
        writer.write_table(content, max_chunksize=300)


def separated(texts, delimiter: str = ",", **options) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, **options)
    writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    return buffer.getvalue().encode()


def json_lines(texts, **options) -> bytes:
    return "\n".join(json.dumps({"id": 1, "text": t, "nested": {"body": t}}, **options) for t in texts).encode()


def json_list(texts, **options) -> bytes:
    return json.dumps([{"id": 1, "text": text} for text in texts], **options).encode()


def pretty(texts) -> bytes:
    return "\n".join(json.dumps({"id": 1, "text": text}, indent=2) for text in texts).encode()


def as_bytes(write: Callable, *args, **options) -> Callable:
    return lambda texts, file: file.write_bytes(write(texts, *args, **options))


def packed(write: Callable, suffix: str) -> Callable:
    return lambda texts, file: file.write_bytes(PACK[suffix](write(texts)))


# Source, with FILE for the name -> what writes it.
FORMATS = {
    "parquet:FILE.parquet": parquet,
    "parquet:FILE.zst.parquet#nested.body": lambda t, f: parquet(t, f, compression="zstd"),
    "parquet:FILE.literal.parquet#a.b": parquet,
    "arrow:FILE.arrow": arrow_stream,
    "arrow:FILE.file.arrow#nested.body": arrow_file,
    "arrow:FILE.feather": lambda t, f: arrow_file(t, f, options=pa.ipc.IpcWriteOptions(compression="lz4")),
    "csv:FILE.csv": as_bytes(separated),
    "csv:FILE.unix.csv#{text}": as_bytes(separated, lineterminator="\n", quoting=csv.QUOTE_ALL),
    "tsv:FILE.tsv#text": as_bytes(separated, "\t"),
    "jsonl:FILE.jsonl": as_bytes(json_lines),
    "jsonl:FILE.raw.jsonl#nested.body": as_bytes(json_lines, ensure_ascii=False),
    "jsonl:FILE.list.json": as_bytes(json_list),
    "jsonl:FILE.indented.json": as_bytes(json_list, indent=1),
    "jsonl:FILE.pretty.json": as_bytes(pretty),
    "text:FILE.txt": as_bytes(lambda texts: "\n\n".join(texts).encode()),
    **{f"csv:FILE.csv{suffix}#text": packed(separated, suffix) for suffix in PACK},
    **{f"jsonl:FILE.jsonl{suffix}": packed(json_lines, suffix) for suffix in PACK},
    **{f"jsonl:FILE.list.json{suffix}": packed(json_list, suffix) for suffix in PACK},
}


def written(source: str, folder: Path, texts) -> str:
    """Writes documents in the format of a source, and returns the source."""
    name = source.partition(":")[2].partition("#")[0]
    FORMATS[source](texts, folder / name.replace("FILE", "file"))
    return source.replace("FILE", f"{folder}/file")


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, str]:
    return expected_corpus(tmp_path_factory.mktemp("expected"))


@pytest.mark.parametrize("source", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path, source):
    assert read_documents(written(source, tmp_path, documents())) == list(documents())


@pytest.mark.parametrize("source", [source for source in FORMATS if not source.endswith((".bz2", ".gz", ".xz"))])
def test_every_format_gives_the_same_corpus(tmp_path, source, expected):
    assert corpus_of(written(source, tmp_path, documents()), tmp_path / "out") == expected


def test_lines_are_the_same_documents(tmp_path):
    texts = documents(500, one_line=True)
    expected = expected_corpus(tmp_path / "expected", texts)
    (tmp_path / "a.txt").write_text("\n".join(texts))
    (tmp_path / "a.tsv").write_text("\n".join(["text\tid", *(f"{text}\t{i}" for i, text in enumerate(texts))]))
    assert corpus_of(f"lines:{tmp_path}/a.txt", tmp_path / "lines") == expected
    assert corpus_of(f"tsv:{tmp_path}/a.tsv", tmp_path / "tsv") == expected


def test_what_hugging_face_datasets_saves_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is an optional package")
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["a", "b", "c"]))
    content = {"text": list(documents(300)), "label": ["a", "b", "c"] * 100}
    saved = datasets.Dataset.from_dict(content, features=features)
    saved.save_to_disk(str(tmp_path), num_shards=2)
    assert read_documents(f"arrow:{tmp_path}/*.arrow") == list(documents(300))


def test_what_is_left_out_is_said_and_recorded(tmp_path):
    records = [*documents(50), None, 3, "", None]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in records) + "\n{}")
    tokenizer = same_documents.tokenizer(tmp_path / "tokenizer")
    log: list[str] = []
    corpus = prepare(same_documents.config_for(f"jsonl:{tmp_path}/*", tokenizer), tmp_path / "corpus", log.append)
    assert [line for line in log if line.startswith("warning")] == [
        f"warning: 2 documents are null and were left out, most in {tmp_path}/a.jsonl",
        f"warning: 1 documents were left out, as their records do not have the column, most in {tmp_path}/a.jsonl",
        "warning: 1 documents are numbers, lists or objects in place of text and were left out, "
        f"most in {tmp_path}/a.jsonl",
        f"warning: 1 empty documents, most in {tmp_path}/a.jsonl",
    ]
    counts = corpus.manifest["source"]["counts"]
    assert counts["null_documents"] == 2
    assert sum(corpus.counts[split]["documents"] for split in ("train", "validation")) == 50


# What is divided into several units.
DIVIDED = ("parquet:FILE.parquet", "arrow:FILE.arrow", "arrow:FILE.file.arrow#nested.body", "jsonl:FILE.jsonl")


@pytest.mark.parametrize("source", FORMATS)
def test_units_can_be_read_in_any_order_and_elsewhere(tmp_path, monkeypatch, source):
    monkeypatch.setattr(base, "UNIT_BYTES", 200_000)
    opened = open_source(written(source, tmp_path, documents()))
    counts: Counter[str] = Counter()
    expected = [list(unit.chunks(counts)) for unit in opened.units]
    assert same_documents.whole(chunk for chunks in expected for chunk in chunks) == list(documents())
    assert counts["read"] == opened.size
    assert counts["files"] == 1
    assert len(expected) > 3 or source not in DIVIDED
    for unit in pickle.loads(pickle.dumps(opened.units[::-1])):
        assert list(unit.chunks()) == expected[unit.number]


def test_a_large_table_with_tabs_is_divided_only_without_quotes(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "UNIT_BYTES", 50_000)
    texts = [f'a "word" {i} é' for i in range(5000)]
    (tmp_path / "plain").write_text("\ufeff" + "".join(f"{a}\t{b}\r\n" for a, b in [("id", "text"), *enumerate(texts)]))
    assert read_documents(f"tsv:{tmp_path}/plain") == texts
    assert len(open_source(f"tsv:{tmp_path}/plain").units) > 2
    (tmp_path / "quoted").write_bytes(separated(documents(), "\t"))
    assert read_documents(f"tsv:{tmp_path}/quoted") == list(documents())
    assert len(open_source(f"tsv:{tmp_path}/quoted").units) == 1
    (tmp_path / "ragged").write_text("id\ttext\n" + "1\ta\n" * 40_000 + "2\tb\tc\n" + "1\ta\n" * 400_000)
    with pytest.raises(UserError, match=r"ragged:40002 has 3 columns, and the first row 2"):
        read_documents(f"tsv:{tmp_path}/ragged")


SCRIPT = """
import sys
sys.modules |= dict.fromkeys(["jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "tensorflow_datasets"])
sys.path.insert(0, {root!r})
from pathlib import Path
from flax_mlm.data import tokenising
from flax_mlm.data.prepare import prepare
from flax_mlm.data.prepare import prepare
from flax_mlm.data.sources import base
from tests.helpers.same_documents import config_for
if __name__ == "__main__":
    base.UNIT_BYTES, tokenising.JOB_CHARS = {unit_bytes}, 20_000
    prepare(config_for({source!r}, Path({tokenizer!r})), sys.argv[1])
"""


@pytest.mark.parametrize("source", ["parquet:FILE.parquet", "csv:FILE.csv"])
def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path, monkeypatch, source):
    monkeypatch.setattr(base, "UNIT_BYTES", 100_000)
    spec = written(source, tmp_path, documents())
    undisturbed = corpus_of(spec, tmp_path / "undisturbed")
    assert len(undisturbed) > 10
    settings = {"root": str(ROOT), "unit_bytes": 100_000, "source": spec}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(**settings, tokenizer=str(tmp_path / "undisturbed" / "tokenizer")))
    command = [sys.executable, str(script), str(tmp_path / "corpus")]
    work = tmp_path / "corpus.tmp"
    for finished in (1, 3, 5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 60
        while len(list(work.glob("*/units/*-*.json"))) < finished and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "corpus").exists()
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert same_documents.digests(tmp_path / "corpus") == undisturbed


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\na\n", r"a\.csv is CSV by its name; use csv:GLOB#column"),
        ("a.csv.gz", gzip.compress(b"text\na\n", mtime=0), r"a\.csv\.gz is CSV by its name"),
        ("a.tsv", b"text\na\n", "use tsv:GLOB#column"),
        ("a.json", b"[]", r"is JSON by its name; use jsonl:GLOB#field"),
        ("a.html", b"<!-- x -->\n<!DOCTYPE html>\n<p>a", "is a web page; expected plain text; extract its text"),
        ("b.txt", b"  <html lang='en'>", "is a web page"),
        ("a.tgz", gzip.compress(b"x", mtime=0), "is a tar archive by its name; expected plain text; unpack it"),
        ("a.tbz2", bz2.compress(b"x"), "is a tar archive by its name"),
    ],
)
@pytest.mark.parametrize("kind", ["text", "lines"])
def test_files_that_would_become_rows_of_markup_are_refused(tmp_path, kind, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(f"{kind}:{tmp_path}/*").check()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("books/*.txt", r"write text:books/\*\.txt$"),
        ("a.csv.gz", r"write csv:a\.csv\.gz$"),
        ("/data/x.parquet#a", r"write parquet:/data/x\.parquet#a$"),
        ("cvs:a.csv", "did you mean 'csv'"),
        ("https://a.b/c.jsonl", r"expected builtin or one of text:GLOB"),
    ],
)
def test_a_source_without_its_kind_is_answered_with_it(source, message):
    with pytest.raises(UserError, match=message):
        open_source(source)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_lines_may_end_in_carriage_returns_alone(tmp_path, monkeypatch, suffix):
    texts = [f"document {i}\nand é" for i in range(300)]
    content = "\r\r".join(text.replace("\n", "\r") for text in texts).encode()
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    assert read_documents(f"text:{tmp_path}/*") == texts
    monkeypatch.setattr(base, "UNIT_BYTES", 100)
    assert read_documents(f"text:{tmp_path}/*") == texts
    assert len(read_documents(f"lines:{tmp_path}/*")) == 600
