"""Labelled texts and tagged sentences from files: what is meant is read, and what cannot be meant is named."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from seqeval.scheme import BILOU, IOB2, IOBES, Entities

from flax_mlm.data import conll, tables
from flax_mlm.errors import UserError


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.tsv", 'sentence\tlabel\na "quoted\t1\nb\t0\n', {}),
        ("a.csv", 'label,text\n1,"a ""quoted"\n0,b\n', {}),
        ("a.csv", 'label;text\n1;"a ""quoted"\n0;b\n', {}),
        ("a.csv", 'label|text\n1|"a ""quoted"\n0|b\n', {}),
        ("a.csv", 'x\t1\t\ta "quoted\ny\t0\t*\tb\n', {"text": "4", "label": "2"}),
        ("a.jsonl", '{"text": "a \\"quoted", "label": 1}\n\n{"text": "b", "label": 0}\n', {}),
        ("a.jsonl", '{"s": "a \\"quoted", "y": 1}\n{"s": "b", "y": 0}', {"text": "s", "label": "y"}),
    ],
)
def test_tables(tmp_path, name, content, columns):
    (tmp_path / name).write_text(content)
    assert tables.read(str(tmp_path / name), **columns)[:3] == (['a "quoted', "b"], None, ["1", "0"])


@pytest.mark.parametrize("space", ["\u2028", "\x85", "\x0c"])
def test_lines_end_at_newlines_alone(tmp_path, space):
    (tmp_path / "a.txt").write_bytes(f"one{space}two\r\nthree\n".encode())
    assert [record["text"] for _, record in tables.records(str(tmp_path / "a.txt"))] == [f"one{space}two", "three"]
    (tmp_path / "tags").write_bytes(f"New{space}York B-A\r\n\r\nis\tO\n".encode())
    assert conll.read(str(tmp_path / "tags")) == conll.Tagged([[f"New{space}York"], ["is"]], [["B-A"], ["O"]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", None, "cannot be read: No such file"),
        ("a.tsv", b"", "has no examples"),
        ("a.tsv", b"sentence\tlabel\n", "has no examples"),
        (
            "a.tsv",
            b"sentence\tscore_of\na\t1\n",
            "has columns sentence, score_of; name the column of the label with",
        ),
        ("a.tsv", b"words\tlabel\na\t1\n", "has columns words, label; name the column of the text"),
        ("a.tsv", b"sentence\tlabel\na\t1\nb\n", "a.tsv:3 has no label"),
        ("a.tsv", b"sentence\tlabel\na\t1\n\t1\n", "a.tsv:3: sentence is empty; expected one text"),
        ("a.tsv", b"sentence\tlabel\ncaf\xe9\t1\n", "is not UTF-8"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b"[1]", "a.jsonl:1 is a list of 1; expected a JSON object a line"),
        ("a.jsonl", b'{"text": "a", "label": 1, "label": 0}', "a.jsonl:1 is not JSON on one line: a key occurs twice"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1 is not JSON on one line: maximum recursion depth"),
        ("a.jsonl", b'{"text": null, "label": 1}', "a.jsonl:1: text is null; expected one text"),
        ("a.jsonl", b'{"text": ["a", "b"], "label": 1}', "a.jsonl:1: text is a list of 2; expected one text"),
        ("a.jsonl", b'{"text": "a", "label": [0, 2]}', "a.jsonl:1: label is a list of 2; expected one label"),
        ("a.jsonl", b'{"text": "a", "label": {"b": 1}}', "a.jsonl:1: label is an object; expected one label"),
        ("a.jsonl", b'{"text": "a", "label": null}', "a.jsonl:1: label is null; expected one label"),
        ("a.jsonl", b'{"text": "a", "label": NaN}', "a.jsonl:1: label is NaN; expected one label"),
        ("a.jsonl", b'{"text": "a", "label": -Infinity}', "a.jsonl:1: label is -inf; expected one label"),
        ("a.jsonl", b'{"text": "a", "label": 1e999}', "a.jsonl:1: label is inf; expected one label"),
        ("a.jsonl", b'{"sentence1": "a", "sentence2": null, "label": 1}', "a.jsonl:1: sentence2 is null; expected one"),
        ("a.csv", b"text,label,label\na,1,0\n", "a.csv:1 has the column 'label' twice"),
        ("a.csv", b'text,label\n"Hello,1\nb,0\n', "a.csv:2 is not CSV: unexpected end of data"),
        ("a.csv", b'text,label\nc,1\n"Hello" you,1\n', "a.csv:3 is not CSV: ',' expected after"),
        ("a.csv", b'text,label\n"two\nlines",1\nb,\n', "a.csv:4: label is empty; expected one label"),
        ("a.csv", b"sentence1,sentence_2,label\na,b,1\n", "has a column sentence1, and no usual name of a second text"),
        ("a.jsonl", b'{"text": "a"}', "has columns text; name the column of the label"),
        (
            "a.csv",
            b"text,label\nHello, world,1\n",
            "a.csv:2 has 3 columns, and the first line 2; where a text holds ',', put it into double quotes; else name",
        ),
        (
            "sts.tsv",  # rows of STS-B with a licence
            b"score\tsentence1\tsentence2\n5\ta b\tc d\n4\ta b\tc d\tCC-BY\n",
            "sts.tsv:3 has 4 columns, and the first line 3; where a text holds a tab, replace it; else name all",
        ),
        (
            "a.tsv",
            b"question\tsentence\tlabel\na\tb\t1\n",
            "has columns sentence and question; choose with --text",
        ),
    ],
)
def test_tables_that_will_not_do(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        tables.read(str(tmp_path / name))
    assert "\n" not in str(e.value)


QUOTED = [["text", "label"], ['He said "yes"', "1"], ["tab\tinside", "0"], ["new\nline", "1"], ["plain", "0"]]


@pytest.mark.parametrize("rows", [QUOTED, *([QUOTED[0], row, QUOTED[4]] for row in QUOTED[1:4])])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_quotes_that_a_writer_of_tables_put_around_cells_are_no_text(tmp_path, rows, quoting):
    """`csv` writes tables as pandas does."""
    written = io.StringIO()
    csv.writer(written, delimiter="\t", lineterminator="\n", quoting=quoting).writerows(rows)
    (tmp_path / "a.tsv").write_text(written.getvalue())
    read = tables.read(str(tmp_path / "a.tsv"))
    assert [list(row) for row in zip(read.texts, read.labels, strict=True)] == rows[1:]


@pytest.mark.parametrize(
    "texts", [['"Hello", he said', 'an "odd" one'], ['"open', 'close"'], ['"Hello"', 'two "" in a row']]
)
def test_other_quotes_are_text(tmp_path, texts):
    (tmp_path / "a.tsv").write_text(f"sentence\tlabel\n{texts[0]}\t1\n{texts[1]}\t0\n")
    assert tables.read(str(tmp_path / "a.tsv")).texts == texts


def test_rows_may_have_further_columns_where_columns_are_numbered(tmp_path):
    """As in STS-B, whose last rows have licences."""
    (tmp_path / "a.csv").write_text("x\t1.5\tone a\ttwo a\ny\t2\tone b\ttwo b\tlicence\tlicence\n")
    read = tables.read(str(tmp_path / "a.csv"), text="3", pair="4", label="2")
    assert read[:3] == (["one a", "one b"], ["two a", "two b"], ["1.5", "2"])


HEADERS = ["text,label", "Review Text,Stars", "review,polarity", "Review Text,Sentiment", "0,1"]


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_is_no_example(tmp_path, header):
    labels = ["1", "0"] if header in ("Review Text,Stars", "0,1") else ["pos", "neg"]
    (tmp_path / "a.csv").write_text(f"{header}\nA good film,{labels[0]}\nA bad film,{labels[1]}\n")
    with pytest.raises(UserError, match=r"a\.csv:1 looks like a header"):
        tables.read(str(tmp_path / "a.csv"), text="1", label="2")


@pytest.mark.parametrize("escape", [r"\ud83d", r"\uDE00", r"\uDE00\uD83D"])
def test_lone_surrogates_are_replaced_as_in_corpora(tmp_path, escape):
    (tmp_path / "a.jsonl").write_text(rf'{{"text": "a \ud83d\ude00 {escape}", "label": NaN}}')
    ((_, record),) = tables.records(str(tmp_path / "a.jsonl"))
    assert set(record["text"]) == set("a \U0001f600\ufffd")


@pytest.mark.parametrize("columns", [{"text": "label"}, {"pair": "text"}, {"text": "2", "label": "2"}])
def test_a_column_has_one_role(tmp_path, columns):
    (tmp_path / "a.csv").write_text("text,label\na b,1\n")
    with pytest.raises(UserError, match=r"column (label|text|2) is two of --text, --pair and --label"):
        tables.read(str(tmp_path / "a.csv"), **columns)


@pytest.mark.parametrize(
    "lines",
    [
        "Hello,0.5\nGood day,1\nBye now,2\n",
        "Hello,a\nGood day,b\nBye now,a\n",
        "Hello,a\nGood,b\nBye,c\n",
        "A good film,1\n",
    ],
)
def test_an_example_is_no_header(tmp_path, lines):
    (tmp_path / "a.csv").write_text(lines)
    assert len(tables.read(str(tmp_path / "a.csv"), text="1", label="2").texts) == lines.count("\n")


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("I-A I-A O I-B I-A", "B-A I-A O B-B B-A"),
        ("B-A I-A B-A O", "B-A I-A B-A O"),
        ("S-A B-B E-B S-A O B-A I-A E-A", "B-A B-B I-B B-A O B-A I-A I-A"),
        ("O I-A B-A", "O B-A B-A"),
    ],
)
def test_all_schemes_become_bio(tags, expected):
    assert conll.to_bio(tags.split()) == expected.split()


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"]), max_size=30))
def test_bio_keeps_what_seqeval_counts(tags):
    once = conll.to_bio(tags)
    assert conll.to_bio(once) == once
    if tags:
        assert f1_score([tags], [once], zero_division=1) == 1.0


SCHEMES = [
    (IOBES, ["S-A", "O", "B-B", "I-B", "E-B", "B-A", "E-A", "S-B"]),
    (BILOU, ["U-A", "O", "B-B", "I-B", "L-B", "B-A", "L-A", "U-B"]),
]


def read_tags(tmp_path, tags: list[str]) -> list[str]:
    (tmp_path / "tags").write_text("".join(f"word {tag}\n" for tag in tags))
    return conll.read(str(tmp_path / "tags")).tags[0]


@pytest.mark.parametrize(("scheme", "tags"), SCHEMES)
def test_schemes_are_read_as_seqeval_reads_them(tmp_path, scheme, tags):
    read = [Entities([tags], scheme), Entities([read_tags(tmp_path, tags)], IOB2)]
    spans = [{(e.start, e.end, e.tag) for e in found.entities[0]} for found in read]
    assert spans[0] == spans[1] != set()


@pytest.mark.parametrize("tags", ["S-A O B-B M-B E-B", "W-A O B-B M-B E-B", "U-A O B-B I-B L-B", "S-A O B-B I-B E-B"])
def test_prefixes_are_converted(tmp_path, tags):
    assert read_tags(tmp_path, tags.split()) == ["B-A", "O", "B-B", "I-B", "I-B"]


def test_tags_may_have_no_kind(tmp_path):
    assert read_tags(tmp_path, ["B", "I", "O"]) == ["B-entity", "I-entity", "O"]


VARIANTS = {
    "-DOCSTART- -X- O\n\nThe DT O\nmayor NN B-PER\n\n-DOCSTART- O\n\n# CD O\n": "",
    "# id 12-ab\tdomain=en\nThe _ _ O\nmayor _ _ B-PER\n\n\n# id 12-ac\tdomain=en\n# _ _ O\n": "",
    "# text = O\n1\tThe\tDT\tO\n1-2\tdu\t_\t_\n2\tmayor\tNN\tB-PER\n2.1\t_\t_\t_\n\n1\t#\tX\tO\n": "2,4",
    "#\thttp://of.it [2009-10-17]\n1\tThe\tO\tO\n2\tmayor\tB-PER\tO\n\n1\t#\tO\tO\n": "2,3",
    "The\tO\nmayor\tB-PER\n\t\n#\tO\n\t\n": "",
    "O The\nB-PER mayor\n\nO #\n": "2,1",
}


@pytest.mark.parametrize(("content", "columns"), VARIANTS.items(), ids=range(len(VARIANTS)))
def test_variants_of_conll(tmp_path, content, columns):
    """CoNLL-2003, MultiCoNER, CoNLL-U, GermEval, WNUT-17, MIT."""
    (tmp_path / "tags").write_text(content)
    assert conll.read(str(tmp_path / "tags"), columns) == ([["The", "mayor"], ["#"]], [["O", "B-PER"], ["O"]])


@pytest.mark.parametrize("columns", ["x", "0,1", "1", "1,2,3", "2,2"])
def test_columns_that_will_not_do(tmp_path, columns):
    (tmp_path / "tags").write_text("The O\n")
    with pytest.raises(UserError, match=f"--columns is '{columns}'; expected the numbers"):
        conll.read(str(tmp_path / "tags"), columns)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "has no tagged sentences"),
        (b"dog\n", r"data:1 is 'dog'; expected a token and a tag"),
        (b"dog B-A\ncat X-A\n", "data:2 is 'cat X-A'"),
        (b"dog B-\n", "data:1 is"),
        (b"caf\xe9 O\n", "is not UTF-8"),
        (b"The O\nNew York B-LOC\nis O\n", "data:2 has 3 columns, and most lines 2"),
        (b"The O\n# a comment\nmayor O\n", "data:2 is '# a comment'"),
        (b"#wow B_X\nyes O\n", "data:1 is '#wow B_X'"),
        (b"1\tThe\tO\tO\n2\tmayor\tB-PER\tO\n", "column 1 has numbers alone; choose columns with --columns"),
    ],
)
def test_tag_files_that_will_not_do(tmp_path, content, message):
    if content is not None:
        (tmp_path / "data").write_bytes(content)
    with pytest.raises(UserError, match=message):
        conll.read(str(tmp_path / "data"))
