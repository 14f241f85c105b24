"""The same documents from buckets as from this machine, in every format, and a corpus that is made there."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flax_mlm.data.cleaning.contamination import read_evaluation
from flax_mlm.data.corpus import Corpus
from flax_mlm.data.prepare import prepare
from flax_mlm.data.sources import base
from flax_mlm.data.sources.open import Options, open_source
from flax_mlm.data.tokenizer import load_tokenizer
from flax_mlm.errors import UserError
from flax_mlm.storage import bucket_sources, buckets
from tests.helpers import same_documents
from tests.helpers.bucket_servers import SCHEMES, serving
from tests.helpers.same_documents import documents, read_documents, whole

TEXTS = documents(300)


@pytest.fixture(scope="module", params=SCHEMES)
def server(request):
    with serving(request.param) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return same_documents.tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """The documents in many formats."""
    folder = tmp_path_factory.mktemp("formats")
    table = pa.table({"text": list(TEXTS)})
    pq.write_table(table, folder / "a.parquet", row_group_size=70)
    with pa.ipc.new_stream(folder / "a.stream", table.schema) as stream:
        stream.write_table(table, max_chunksize=50)
    with pa.ipc.new_file(folder / "a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=50)
    with gzip.open(folder / "a.csv.gz", "wt", newline="") as opened:
        csv.writer(opened).writerows([["text"], *([text] for text in TEXTS)])
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.txt").write_text("\n\n".join(TEXTS))
    ids = [np.append(i, 65535) for i in load_tokenizer(tokenizer).encode(list(TEXTS))]
    np.concatenate(ids).astype("<u2").tofile(folder / "a.bin")
    (folder / "a.json").write_text(json.dumps({"dtype": "uint16", "document_end": 65535}))
    return folder


SOURCES = ("parquet:*.parquet", "arrow:*.stream", "arrow:a.arrow", "csv:a.csv.*", "jsonl:a.jsonl", "text:a.txt",
           "ids:*.bin", "text:a.txt|jsonl:a.jsonl")  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_each_format_is_read_in_ranges(server, folder, tokenizer, monkeypatch, source):
    monkeypatch.setattr(base, "UNIT_BYTES", 10_000)
    url = server.put_folder(folder, "formats")
    options = Options(tokenizer_path=str(tokenizer))
    kinds = [part.split(":") for part in source.split("|")]
    there = open_source("|".join(f"{kind}:{url}/{glob}" for kind, glob in kinds), options)
    here = open_source("|".join(f"{kind}:{folder}/{glob}" for kind, glob in kinds), options)
    there.check()
    assert len(there.units) == len(here.units) > (0 if source.startswith("csv") else 2)
    texts = whole(there.chunks())
    assert texts == whole(here.chunks())
    assert [text.split() for text in texts] == [text.split() for text in TEXTS] * len(kinds)


def test_what_is_not_there_is_named(server, folder):
    url = server.put_folder(folder, "formats")
    with pytest.raises(UserError, match=rf"data.source is 'text:{url}/\*.md'; no object matches"):
        open_source(f"text:{url}/*.md")
    with pytest.raises(UserError, match=rf"'{url}' is a folder; expected files: text:{url}/\*"):
        open_source(f"text:{url}")
    with pytest.raises(UserError, match="has the scheme ftp://; expected a local path, or gs://"):
        open_source("text:ftp://host/a.txt")


def test_evaluation_files_may_lie_in_a_bucket(server, folder):
    url = server.put_folder(folder, "formats")
    there = read_evaluation([f"{url}/*.jsonl", f"{url}/*.csv.gz"])
    assert there.digest == read_evaluation([f"{folder}/*.jsonl", f"{folder}/*.csv.gz"]).digest
    assert there.files == (f"{url}/a.jsonl", f"{url}/a.csv.gz")
    with pytest.raises(UserError, match=rf"data.decontaminate has '{url}/none'; no object matches"):
        read_evaluation([f"{url}/none"])


def test_an_object_that_changes_is_refused(server, folder):
    url = server.put_folder(folder, "changing")
    source = open_source(f"text:{url}/a.txt")
    server.put("changing/a.txt", b"other text")
    with pytest.raises(UserError, match=r"changing/a.txt' was changed or deleted"):
        read_all(source)


def read_all(source) -> list[str]:
    return [chunk.text for chunk in source.chunks()]


def test_a_corpus_is_made_in_a_bucket_from_one(server, folder, tokenizer, tmp_path):
    url = server.put_folder(folder, "made")
    config = same_documents.config_for(f"jsonl:{url}/a.jsonl", tokenizer)
    prepare(config, f"{url}-corpus", lambda line: None)
    local = same_documents.config_for(f"jsonl:{folder}/a.jsonl", tokenizer)
    expected = prepare(local, tmp_path / "corpus", lambda line: None)
    found = {path.url.rpartition("/")[2]: buckets.read(path.url) for path in bucket_sources.find("test", f"{url}-*/**")}
    names = {path.name for path in (tmp_path / "corpus").iterdir()}
    assert found.keys() == names, "and nothing else is left"
    assert all(found[name] == (tmp_path / "corpus" / name).read_bytes() for name in names - {"corpus.json"})
    assert Corpus.open(f"{url}-corpus").fingerprint == expected.fingerprint


def test_reading_on_this_machine_gives_the_documents(folder):
    assert read_documents(f"text:{folder}/a.txt") == list(TEXTS)
