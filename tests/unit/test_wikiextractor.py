"""WikiExtractor's output: its tags and its JSON lines, compressed or not, wherever a file is divided."""

import bz2
import gzip
import html
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_mlm.data.sources.open import open_source
from flax_mlm.data.text import CHUNK_CHARS
from flax_mlm.errors import UserError
from tests.helpers.sources import read, units_of

TEXTS = ["Anarchism\n\nAnarchism is a &lt;b&gt; philosophy.\n\nIt &amp; more.", "Ä\n\nÄ is a letter.", "Alone"]


def tagged(texts: list[str]) -> str:
    """Documents as WikiExtractor writes them."""
    head = '<doc id="{}" url="https://en.wikipedia.org/wiki?curid={}" title="{}">\n'
    return "".join(f"{head.format(i, i, html.escape(t.split(chr(10))[0]))}{t}\n\n</doc>\n" for i, t in enumerate(texts))


def json_lines(texts: list[str]) -> str:
    """Documents as `WikiExtractor --json` writes them."""
    return "".join(json.dumps({"id": str(i), "revid": "1", "text": t}) + "\n" for i, t in enumerate(texts))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress], ids=["", ".gz", ".bz2"])
def test_both_forms_give_their_documents(tmp_path, pack):
    suffix = {bytes: "", gzip.compress: ".gz", bz2.compress: ".bz2"}[pack]
    (tmp_path / f"wiki_00{suffix}").write_bytes(pack(tagged([*TEXTS, ""]).encode()))
    (tmp_path / f"wiki_01{suffix}").write_bytes(pack(json_lines([*TEXTS, " "]).encode()))
    texts, counts = read(f"wikiextractor:{tmp_path}/wiki_*")
    assert texts == TEXTS * 2
    assert counts["empty_documents"] == 2
    assert counts["files"] == 2


def test_a_long_document_is_read_in_bounded_chunks(tmp_path):
    long = "Title\n\n" + "\n\n".join("word " * 900 + str(i) for i in range(60))
    (tmp_path / "a").write_text(tagged([long, "b"]))
    source = f"wikiextractor:{tmp_path}/a"
    assert read(source)[0] == [long, "b"]
    assert max(len(chunk.text) for chunk in open_source(source).chunks()) <= CHUNK_CHARS


def test_lines_between_documents_are_counted(tmp_path):
    (tmp_path / "a").write_text(f"{tagged(['a'])}lost\n\n</doc>\n{tagged(['b'])}")
    texts, counts = read(f"wikiextractor:{tmp_path}/a")
    assert texts == ["a", "b"]
    assert counts["lines_outside_documents"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Only text.\n", "a begins with 'Only text.'; expected WikiExtractor's output"),
        ("[1]\n", "a begins with '.1.'"),
        (tagged(["a"])[:-9], "a ends inside a document, without </doc>"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "a").write_text(content)
    with pytest.raises(UserError, match=message):
        read(f"wikiextractor:{tmp_path}/a")


LINES = st.lists(
    st.sampled_from(["a", "", " ", "b <doc id", "</doc>", '<doc id="1" url="u" title="t">', "x" * 20, "é"]), max_size=20
)


@settings(deadline=None)
@given(LINES, st.integers(1, 60))
@pytest.mark.parametrize("form", ["tags", "json"])
def test_ranges_hold_each_document_once_wherever_they_are_cut(tmp_path_factory, form, lines, size):
    path = tmp_path_factory.mktemp("wiki") / "a"
    content = tagged(["T"]) + "\n".join([*lines, "</doc>", ""]) if form == "tags" else json_lines(["T", *lines])
    path.write_bytes(content.encode())
    expected = read(f"wikiextractor:{path}")
    assert expected[0][0] == "T"
    with units_of(size):
        assert len(open_source(f"wikiextractor:{path}").units) == -(-path.stat().st_size // size)
        assert read(f"wikiextractor:{path}") == expected
