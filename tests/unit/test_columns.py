"""Columns, nested fields and templates; records without text are counted, and what cannot be read is named."""

import csv
import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_mlm.data.held_out import check_fraction
from flax_mlm.data.sources import columns, json_objects
from flax_mlm.data.sources.files import File
from flax_mlm.data.sources.open import Options, open_source
from flax_mlm.errors import UserError
from tests.helpers.same_documents import read_documents, whole

RECORDS = [
    {"title": "One", "text": "first\n\n  words", "meta": {"body": "inner 1", "deep": {"er": "x"}}, "n": 1},
    {"title": None, "text": "second", "meta": {"body": None, "deep": {"er": "y"}}, "n": 2},
    {"title": "Three", "text": None, "meta": None, "n": 3},
    {"title": None, "text": None, "meta": {"body": "inner 4", "deep": None}, "n": 4},
    {"title": "", "text": " ", "meta": {"body": "", "deep": {"er": None}}, "n": 5},
]


def write(kind: str, folder, records) -> str:
    """Writes records; returns the source without a column."""
    file = folder / f"file.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, records)))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), file, row_group_size=2)
    else:
        table = pa.Table.from_pylist(records)
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return f"{kind}:{file}"


def read(source: str) -> tuple[list[str], dict[str, int]]:
    counts: Counter[str] = Counter()
    texts = whole(open_source(source).chunks(counts))
    return texts, {kind: counts[kind] for kind in (*columns.LOST, "empty_documents") if counts[kind]}


KINDS = pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])


@KINDS
@pytest.mark.parametrize(
    ("column", "texts", "counts"),
    [
        ("", ["first\n\n  words", "second"], {"null_documents": 2, "empty_documents": 1}),
        ("#text", ["first\n\n  words", "second"], {"null_documents": 2, "empty_documents": 1}),
        ("#meta.body", ["inner 1", "inner 4"], {"null_documents": 2, "empty_documents": 1}),
        ("#meta.deep.er", ["x", "y"], {"null_documents": 3}),
        (
            r"#{title}\n{text}",
            ["One\nfirst\n\n  words", "\nsecond", "Three\n"],
            {"null_documents": 1, "incomplete_documents": 2, "empty_documents": 1},
        ),
        (r"#{{{meta.body}}}\t# {title}", ["{inner 1}\t# One", "{}\t# Three", "{inner 4}\t# "], None),
    ],
)
def test_columns_nested_fields_and_templates(tmp_path, kind, column, texts, counts):
    found, lost = read(write(kind, tmp_path, RECORDS) + column)
    assert found == texts
    assert counts is None or lost == counts


@KINDS
def test_a_literal_column_goes_before_a_nested_one(tmp_path, kind):
    records = [{"a.b": "literal", "a": {"b": "nested", "c": "other"}}]
    source = write(kind, tmp_path, records)
    assert read(source + "#a.b")[0] == ["literal"]
    assert read(source + "#a.c")[0] == ["other"]


@KINDS
def test_the_only_column_of_text_is_the_default(tmp_path, kind):
    (tmp_path / "one").mkdir()
    assert read(write(kind, tmp_path / "one", [{"n": 1, "body": "a"}]))[0] == ["a"]
    with pytest.raises(UserError, match=r"has no (column|field) 'text', and it is not clear .* it has n, body, title"):
        read(write(kind, tmp_path, [{"n": 1, "body": "a", "title": "b"}]))


@KINDS
@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("#txet", r"file\.\w+ has no (column|field) 'txet'; it has title, text, .*; did you mean 'text'\?"),
        ("#meta.bdy", r"it has title, text, meta\.body, meta\.deep\.er, n; did you mean 'meta\.body'\?"),
        ("#zzz", r"has no \w+ 'zzz'; it has title, text, .*; name one of them"),
        ("#{title} {zzz}", "has no (column|field) 'zzz'"),
        ("#{title", r"'{title' has a brace that is not closed"),
        ("#{{title}}", "names no column"),
    ],
)
def test_a_column_that_is_not_there(tmp_path, kind, column, message):
    with pytest.raises(UserError, match=message):
        read(write(kind, tmp_path, RECORDS) + column)


def test_json_fields_that_later_objects_lack_are_counted(tmp_path):
    lines = [{"text": "a"}, {"body": "b"}, {"text": 3}, {"text": ["c"]}, {"text": float("nan")}, {"text": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    texts, lost = read(f"jsonl:{tmp_path}/a.jsonl")
    assert texts == ["a"]
    assert lost == {"missing_documents": 1, "non_string_documents": 3, "null_documents": 1}
    assert columns.lost(lost) == [
        "1 documents are null and were left out",
        "1 documents were left out, as their records do not have the column",
        "3 documents are numbers, lists or objects in place of text and were left out",
    ]


def test_a_source_without_any_text_says_why(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * 9)
    with pytest.raises(UserError, match="holds no text; 9 documents are null"):
        check_fraction(open_source(f"jsonl:{tmp_path}/a.jsonl"), 0.5)


def test_a_column_of_another_type_is_named(tmp_path):
    source = write("parquet", tmp_path, RECORDS)
    with pytest.raises(UserError, match=r"has a column 'n' of int64; expected text .* name a column of text"):
        read(source + "#n")
    with pytest.raises(UserError, match=r"has a column 'meta' of struct.*; name one of its fields, as in meta.body"):
        read(source + "#meta")


TYPES = {
    "string": pa.string(),
    "large": pa.large_string(),
    "view": pa.string_view(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}


@pytest.mark.parametrize("kind", ["parquet", "arrow", "file"])
@pytest.mark.parametrize("name", TYPES)
def test_types_of_text(tmp_path, name, kind):
    texts = ["ä b", "", None, "北京", "ä b", "x" * 70]
    plain = [text if text is None else text.encode() for text in texts] if "binary" in name else texts
    table = pa.table({"text": pa.array(plain).cast(TYPES[name]), "n": range(6)})
    file = tmp_path / "a"
    if kind == "parquet":
        pq.write_table(table, file, row_group_size=4)
    else:
        with (pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file)(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    found, lost = read(f"{'parquet' if kind == 'parquet' else 'arrow'}:{file}#text")
    assert found == ["ä b", "北京", "ä b", "x" * 70]
    assert lost == {"null_documents": 1, "empty_documents": 1}


def test_bytes_that_are_no_utf_8_are_replaced_and_counted(tmp_path):
    pq.write_table(pa.table({"text": [b"caf\xe9", b"fine"]}), tmp_path / "a")
    counts: Counter[str] = Counter()
    assert whole(open_source(f"parquet:{tmp_path}/a#text").chunks(counts)) == ["caf\ufffd", "fine"]
    assert counts["undecodable_bytes"] == 1


def test_a_column_of_nothing_but_null(tmp_path):
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    assert read(f"parquet:{tmp_path}/*") == (["a"], {"null_documents": 3})


def damaged(tmp_path, kind: str, damage) -> str:
    source = write(kind, tmp_path, RECORDS * 1000)
    file = tmp_path / f"file.{kind}"
    file.write_bytes(damage(file.read_bytes()))
    return source + "#text"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-3],
        lambda data: data[:20],
        lambda data: data[:100] + b"\xff" * (len(data) - 200) + data[-100:],
        lambda data: b"title,text\na,b\n" * 20,
        lambda data: b"",
        lambda data: gzip.compress(data),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, kind, damage):
    if kind == "arrow" and damage(b"\0" * 1000) == b"\0" * 997:
        pytest.skip("a stream may end without its mark of the end")
    with pytest.raises(UserError, match=rf"file\.{kind} (is|cannot)") as e:
        read(damaged(tmp_path, kind, damage))
    assert "\n" not in str(e.value)


def test_checksums_of_pages_are_checked(tmp_path):
    file = tmp_path / "a.parquet"
    texts = [f"document {i}" for i in range(100)]
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table({"text": texts}), file, write_page_checksum=True, **options)
    assert read(f"parquet:{file}")[0] == texts
    file.write_bytes(file.read_bytes().replace(b"document 7", b"docUment 7"))
    with pytest.raises(UserError, match=r"a\.parquet is a damaged or incomplete Parquet file"):
        read(f"parquet:{file}")


def test_a_stream_that_ends_early_is_found_before_it_is_read(tmp_path):
    source = write("arrow", tmp_path, RECORDS * 100)
    file = tmp_path / "file.arrow"
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"file\.arrow is (an incomplete|a damaged or incomplete) Arrow file"):
        open_source(source)


def test_a_file_of_another_kind_is_named(tmp_path):
    write("arrow", tmp_path, RECORDS)
    write("parquet", tmp_path, RECORDS)
    with pytest.raises(UserError, match="is an Arrow file; expected Parquet format; use arrow:GLOB#column"):
        read(f"parquet:{tmp_path}/file.arrow")
    with pytest.raises(UserError, match="is a Parquet file; expected Arrow format; use parquet:GLOB#column"):
        read(f"arrow:{tmp_path}/file.parquet")
    for kind in ("csv", "tsv", "jsonl", "text"):
        with pytest.raises(UserError, match=r"is a Parquet file; expected plain text; use parquet:GLOB#column"):
            read(f"{kind}:{tmp_path}/file.parquet")


def table_file(tmp_path, text: str, encoding: str = "utf8") -> str:
    (tmp_path / "a").write_bytes(text.encode(encoding))
    return f"csv:{tmp_path}/a"


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("id,text\n1,a\n2,b,c\n", "", r"a:3 has 3 columns, and the first row 2; where a text holds commas"),
        ('id,text\n1,"a\nb"\n2\n', "", r"a:4 has 1 columns, and the first row 2"),
        ('id,text\n1,"a" b\n', "", r"a:2 is no row of CSV: .*double the quotes"),
        ('id,text\n1,"a\n', "", r"a:2 is no row of CSV: a quoted text does not end"),
        ("id,text\n1,a\n", "#txt", r"has no column 'txt'; it has id, text; did you mean 'text'\?"),
        ("id,body\n1,a\n", "", r"has no column 'text', and it is not clear .* it has id, body"),
        ("id;text\n1;a\n", "", r"has semicolons between its columns, .* expected commas; write it with commas"),
        ("id\ttext\n1\ta\n", "#text", r"has tabs between its columns.*; use tsv:GLOB#column"),
        ("text,id,text\na,1,b\n", "", r"a:1 has the column 'text' twice"),
        ("id,text\n1,a\n", "#2", r"begins with a header \(id, text\).*; name the column"),
        ("1,a\n2,b\n", "#3", r"has 2 columns; expected a number from 1 to that, not 3"),
        ('{"text": "a"}\n', "#text", "has JSON in its first line.*; use jsonl:GLOB#field"),
    ],
)
def test_a_table_that_will_not_do(tmp_path, text, column, message):
    with pytest.raises(UserError, match=message):
        read(table_file(tmp_path, text) + column)


def test_tables_of_every_kind(tmp_path):
    assert read(table_file(tmp_path, "1,a\n2,b\n") + "#2")[0] == ["a", "b"]
    assert read(table_file(tmp_path, '\ufefftext\r\n"a,\r\nb"\r\n\r\nc\r\n')) == (["a,\r\nb", "c"], {})
    assert read(table_file(tmp_path, "id,text\r1,a\r2,b\r"))[0] == ["a", "b"]
    assert read(table_file(tmp_path, "id,text\n1,a\n2,\n3,b\n")) == (["a", "b"], {"empty_documents": 1})
    assert read(table_file(tmp_path, "id,text\n1,bäker\n", "utf-16"))[0] == ["bäker"]
    source = table_file(tmp_path, "id,text\n1,bäker\n", "latin1")
    assert read_documents(source, Options("latin1")) == ["bäker"]
    assert read(table_file(tmp_path, f'id,text\n1,"{"x" * 300_000}"\n'))[0] == ["x" * 300_000]


def test_quotes_between_tabs_are_text_unless_a_writer_has_made_them(tmp_path):
    (tmp_path / "a").write_text('id\ttext\n1\t"quoted" word\n2\tand "more\n')
    assert read(f"tsv:{tmp_path}/a")[0] == ['"quoted" word', 'and "more']
    (tmp_path / "a").write_text('id\ttext\n1\t"a\n\nb"\n2\t"c ""d"""\n')
    assert read(f"tsv:{tmp_path}/a")[0] == ["a\n\nb", 'c "d"']


CELLS = st.text(alphabet='ab,"\n\r;\t ä\u2028', max_size=12)


@given(
    st.lists(st.tuples(CELLS, CELLS), max_size=8),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_csv_is_read_as_python_reads_it(tmp_path_factory, rows, quoting, end):
    if (quoting, end) == (csv.QUOTE_MINIMAL, "\n"):  # Python 3.11 leaves a carriage return unquoted then
        rows = [tuple(cell.replace("\r", "") for cell in row) for row in rows]
    path = tmp_path_factory.mktemp("csv") / "a"
    with path.open("w", newline="", encoding="utf8") as file:
        csv.writer(file, quoting=quoting, lineterminator=end).writerows([["id", "text"], *rows])
    with path.open(newline="", encoding="utf8") as file:
        expected = [row["text"] for row in csv.DictReader(file)]
    assert expected == [text for _, text in rows]
    assert read(f"csv:{path}")[0] == [text for text in expected if text.strip()]


OBJECTS = st.lists(st.fixed_dictionaries({"text": st.text(max_size=20), "x": st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | st.text(alphabet='{}[]",\\\n ä🙂', max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6,
)}), max_size=8)  # fmt: skip


@given(OBJECTS, st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 40))
def test_json_in_any_layout_and_parts_of_any_size(tmp_path_factory, objects, indent, ascii_only, size):
    path = tmp_path_factory.mktemp("json") / "a"
    expected = [each["text"] for each in objects]
    expected = [text for text in expected if text.strip()]
    options = {"indent": indent, "ensure_ascii": ascii_only}
    layouts = [json.dumps(objects, **options), "\n".join(json.dumps(each, **options) for each in objects)]
    blocks = json_objects.blocks
    for text in layouts:
        path.write_text(" \n" * (size % 3) + text + "\n", encoding="utf8")
        with pytest.MonkeyPatch.context() as m:
            m.setattr(json_objects, "blocks", lambda file, counts: blocks(file, counts, size))
            assert read(f"jsonl:{path}#text")[0] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}, {"text": "b"]', r"a:1 is not JSON: Expecting"),
        ('[{"text": "a"},\n{"text": "b"}', r"a:2 ends early, without ','|a:2 ends early"),
        ('[{"text": "a"},\n 3]', r"a:2 is no object, as '3' shows"),
        ('[{"text": "a"}]\n[', r"a:2 has '\[' after the end of the list"),
        ('{\n"text": "a"\n}\n{\n"text": }', r"a:5 is not JSON: Expecting value"),
        ('{\n"text": "a"\n}\n{\n"text": "b', r"a:5 is not JSON: Unterminated string"),
        ("title,text\na,b\n", r"a:1 is not JSON: .* expected JSON objects"),
    ],
)
def test_damaged_json_is_named_by_its_line(tmp_path, text, message):
    (tmp_path / "a").write_text(text)
    with pytest.raises(UserError, match=message):
        read(f"jsonl:{tmp_path}/a")


def test_an_error_early_in_a_list_is_found_without_reading_on(tmp_path):
    parts = iter(['[{"text": "a"}, {"text": nil}', *[', {"text": "b"}' * 10] * 100])
    with pytest.raises(UserError, match="a:1 is not JSON: Expecting value"):
        list(json_objects._values(File("a", 0, None), parts, is_list=True))
    assert len(list(parts)) >= 98


def test_names_of_files_with_a_number_sign(tmp_path):
    for name in ("a#1.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x", "#t": "y"}\n')
    assert read(f"jsonl:{tmp_path}/a#1.jsonl")[0] == ["x"]
    assert read(f"jsonl:{tmp_path}/a#*.jsonl#text")[0] == ["x"]
    assert read(f"jsonl:{tmp_path}/b.jsonl### {{text}} #{{#t}}")[0] == ["## x #y"]
