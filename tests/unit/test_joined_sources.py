"""Several sources joined by `|` are read in order, as one."""

import json

import pytest

from flax_mlm.data.sources.open import open_source, split_sources
from flax_mlm.errors import UserError
from tests.helpers.sources import read, units_of


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in ("three", "four")))
    (tmp_path / "c.fasta").write_text(">x\nMKT\n")
    return tmp_path


def test_documents_follow_one_another_in_the_order_of_the_sources(folder):
    spec = f"jsonl:{folder}/*.jsonl#body|text:{folder}/a.txt | fasta:{folder}/c.fasta"
    assert read(spec)[0] == ["three", "four", "one", "two", "MKT"]
    source = open_source(spec)
    assert [unit.number for unit in source.units] == [0, 1, 2]
    assert source.name == f"jsonl:{folder}/*.jsonl#body | text:{folder}/a.txt | fasta:{folder}/c.fasta"
    assert source.licence == "not stated; that of the files"
    with units_of(4):
        assert read(spec)[0] == ["three", "four", "one", "two", "MKT"]
        numbers = [unit.number for unit in open_source(spec).units]
        assert numbers == list(range(len(numbers)))


def test_the_version_depends_on_each_source_and_on_their_order(folder):
    a, b = f"text:{folder}/a.txt", f"jsonl:{folder}/b.jsonl#body"
    versions = [json.dumps(open_source(spec).version) for spec in (a, b, f"{a}|{b}", f"{b}|{a}", f"{a}|{a}")]
    assert len(set(versions)) == 5


def test_the_built_in_text_may_be_one_of_them(folder):
    alone, joined = open_source("builtin"), open_source(f"builtin|text:{folder}/a.txt")
    assert joined.size == alone.size + 8
    assert joined.name.startswith(alone.name)
    assert joined.licence == f"{alone.licence} | not stated; that of the files"


@pytest.mark.parametrize("pattern", ["x|text:y.txt", "x|text:y.*", "x|text:y.jsonl#body", "x|lines:/*/z.txt"])
def test_a_bar_in_the_name_of_a_file_that_exists_goes_first(tmp_path, pattern):
    (tmp_path / "x|text:y.txt").write_text("text")
    (tmp_path / "x|text:y.jsonl").write_text('{"body": "text"}\n')
    (tmp_path / "x|lines:").mkdir()
    (tmp_path / "x|lines:" / "w").mkdir()
    (tmp_path / "x|lines:" / "w" / "z.txt").write_text("text")
    first = f"text:{tmp_path}/{pattern}"
    assert split_sources(f"builtin|{first}|builtin") == ["builtin", first, "builtin"]


def test_errors_name_the_one_source(folder):
    with pytest.raises(UserError, match=r"data.source is 'text:/nowhere/\*'; no file matches"):
        open_source(f"text:{folder}/a.txt|text:/nowhere/*")
    with pytest.raises(UserError, match=r"data.source is 'texts:a'; expected builtin or one of"):
        open_source(f"text:{folder}/a.txt|texts:a")
    for spec in ("builtin|", "|builtin", f"text:{folder}/a.txt||builtin"):
        with pytest.raises(UserError, match=r"expected a source on each side of '\|'"):
            open_source(spec)


def test_each_source_is_checked(folder):
    (folder / "bad.fasta").write_text("MKT\n")
    with pytest.raises(UserError, match=r"bad\.fasta does not begin with a record"):
        open_source(f"text:{folder}/a.txt|fasta:{folder}/bad.fasta").check()
