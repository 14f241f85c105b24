"""Mistakes in what `data.source` names: one line that says what is wrong, and nothing left out in silence."""

import gzip
import json
import os
from collections import Counter

import pytest

from flax_mlm.config.load import build
from flax_mlm.configs import base
from flax_mlm.data.held_out import check_fraction
from flax_mlm.data.sources import json_objects
from flax_mlm.data.sources.open import open_source
from flax_mlm.errors import UserError
from tests.helpers.sources import read


def test_a_link_to_nothing_is_not_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"/b\.txt is a link to what is not there; expected files"):
        open_source(f"text:{tmp_path}/*.txt")


def test_a_pipe_is_not_left_out(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"/a\.txt is a pipe, a socket or a device; expected files"):
        open_source(f"text:{tmp_path}/a.txt")


def test_a_link_to_a_file_is_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    assert read(f"text:{tmp_path}/*.txt")[0] == ["one", "one"]


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("s3://bucket/a/*.jsonl.gz#body", "jsonl:s3://bucket/a/*.jsonl.gz#body"),
        ("gs://bucket/a", "text:gs://bucket/a"),
        ("az://container/x.parquet", "parquet:az://container/x.parquet"),
    ],
)
def test_a_url_without_a_kind_is_answered_with_one(spec, meant):
    with pytest.raises(UserError) as error:
        open_source(spec)
    assert str(error.value).endswith(f"; write {meant}")


@pytest.mark.parametrize("name", ["a.fasta", "a.faa.gz", "A.FNA"])
@pytest.mark.parametrize("kind", ["text", "lines", "symbols"])
def test_fasta_is_not_taken_for_lines_of_text(tmp_path, kind, name):
    (tmp_path / name).write_text(">a\nMKT\n")
    with pytest.raises(UserError, match="is FASTA by its name; use fasta:GLOB"):
        open_source(f"{kind}:{tmp_path}/*")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_json_line_without_end_is_not_read_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr(json_objects, "_MAX_LINE", 1 << 20)
    longest = []
    loads = json.loads
    monkeypatch.setattr(json_objects.json, "loads", lambda text: longest.append(len(text)) or loads(text))
    lines = b'{"text": "one"}\n{"text": "' + b"two " * (1 << 19) + b'"}\n'
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    with pytest.raises(UserError, match=rf"{name}:2 has a line of more than 1,048,576 bytes; expected JSON objects"):
        read(f"jsonl:{tmp_path}/*")
    assert max(longest) < 1 << 20


def test_a_first_json_line_without_end_is_an_object_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(json_objects, "_MAX_LINE", 1 << 20)
    monkeypatch.setattr(json_objects, "_MAX_CHARS", 1 << 18)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"two " * (1 << 19) + b'"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:1 begins an object of more than 262,144 characters"):
        read(f"jsonl:{tmp_path}/*")


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", "for which a file needs a byte-order mark.*such as utf-16-le"),
        ("UTF32", "for which a file needs a byte-order mark"),
        ("idna", "expected an encoding of Python"),
        ("base64", "expected an encoding of Python"),
    ],
)
def test_an_encoding_that_would_fail_on_every_file_is_refused_at_once(encoding, message):
    c = base.get_config()
    c.data.encoding = encoding
    with pytest.raises(UserError, match=f"data.encoding is '{encoding}'.*{message}"):
        build(c)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf_8", "latin1", "gb18030", "shift_jis", "cp1252", "utf-8-sig"])
def test_an_encoding_that_files_may_have_is_taken(encoding):
    c = base.get_config()
    c.data.encoding = encoding
    assert build(c).data.encoding == encoding


def test_what_is_left_out_is_counted_for_each_file_and_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n')
    (tmp_path / "b.jsonl").write_text('{"text": null}\n{"text": null}\n{"body": "two"}\n')
    (tmp_path / "c.jsonl").write_text("")
    by_file: dict[str, Counter[str]] = {}
    list(open_source(f"jsonl:{tmp_path}/*").chunks(by_file=by_file))
    a, b, c = (f"{tmp_path}/{name}.jsonl" for name in "abc")
    assert by_file == {
        "null_documents": {a: 1, b: 2},
        "empty_documents": {a: 1},
        "missing_documents": {b: 1},
        "empty_files": {b: 1, c: 1},
    }


def test_a_source_of_empty_documents_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " "}\n{"text": null}\n')
    message = "holds no text; 1 documents are null and were left out; 2 documents are empty"
    with pytest.raises(UserError, match=message):
        check_fraction(open_source(f"jsonl:{tmp_path}/*"), 0.05)
