"""Labelled texts and pairs of texts from files: tables (tabs, commas, semicolons or bars), JSON lines, lines of text
(.txt), and prepared TensorFlow Datasets."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from flax_mlm.data.tf import prepared_tfds
from flax_mlm.errors import UserError, as_user_error, json_kind
from flax_mlm.storage import files

_TEXT = ("sentence", "text", "sentence1", "premise", "question", "question1")
_FIRST = ("sentence1", "premise", "question1")  # of two
_PAIR = ("sentence2", "hypothesis", "question2", "text2")
_LABEL = ("label", "score", "labels")
_FLAGS = {**dict.fromkeys(("0", "0.0", "false"), False), **dict.fromkeys(("1", "1.0", "true"), True)}
FIELD_CHARS = 1 << 26  # of a cell, at most; a quote that is not closed would take all that follows
HEADER = (*_TEXT, *_PAIR, *_LABEL, "category", "class", "rating", "sentiment", "stars", "target")


class Labelled(NamedTuple):
    """N texts with their labels as text."""

    texts: list[str]
    pairs: list[str] | None  # second texts
    labels: list[Any]  # text; where a text has any number of labels, tuples of them
    locations: list[str] | None = None  # FILE:LINE of each, for messages

    def location(self, index: int) -> str:
        """Names an example."""
        return self.locations[index] if self.locations else f"example {index + 1}"


def take(columns: Any, indices: Iterable[int]) -> Any:
    """Selects rows of a NamedTuple of columns; columns that are None stay so."""
    rows = list(indices)
    return type(columns)(*(None if column is None else [column[i] for i in rows] for column in columns))


def read(source: str, text: str = "", pair: str = "", label: str = "", separator: str = "") -> Labelled:
    """Reads labelled texts from a file, or from `tfds:NAME[/config]:split`.

    Args:
      text, pair, label: names of the columns, or their numbers from 1 in a table without header; empty: the usual names
        (`sentence`, `sentence1` and `sentence2`, `label` and the like).
      separator: a text has any number of labels: a list in JSON, or text separated so; or `label` is several names of
        columns of 0 and 1, separated by commas. Empty: one label a text.

    Raises:
      UserError: it cannot be read, is empty, lacks a column, or has a header although columns are numbered; or a value
        is missing, null, NaN, a list or an object. The message names the file and the line.
    """
    several = [name for name in map(str.strip, label.split(",")) if name] if separator else []
    label = several[0] if several else label
    numbered = any(name.isdecimal() for name in (text, pair, label))
    rows = records(source, numbered)
    first = rows[0][1]
    if not text and not pair:
        candidates = [name for name in _TEXT if name in first]
        if len(candidates) > 1 and not any(name in first for name in _PAIR):
            raise UserError(f"{source} has columns {' and '.join(candidates)}; choose with --text and --pair")
    roles = {"text": (text, _TEXT), "pair": (pair, _PAIR), "label": (label, _LABEL)}
    columns = {role: name or next((n for n in usual if n in first), "") for role, (name, usual) in roles.items()}
    if not text and not columns["pair"] and columns["text"] in _FIRST:
        what = f"{source} has a column {columns['text']}, and no usual name of a second text"
        raise UserError(f"{what}; name its column with --pair, or use --text={columns['text']} alone")
    named = [name for name in columns.values() if name]
    if twice := next((name for name in named if named.count(name) > 1), ""):
        raise UserError(f"column {twice} is two of --text, --pair and --label; expected columns that differ")
    for role in ("text", "label"):
        if not columns[role]:
            what = f"{source} has columns {_names(first)}; name the column of the {role} with --{role}=NAME"
            raise UserError(f"{what}, or by its number from 1 where the first line is no header")
    roles_read = [role for role in columns if columns[role] and not (separator and role == "label")]
    values: dict[str, list[Any]] = {role: [_value(*row, columns[role], role) for row in rows] for role in roles_read}
    if separator:
        values["label"] = [_label_set(*row, several or [columns["label"]], separator) for row in rows]
    if numbered:
        _refuse_header(rows[0], values["text"], [x if isinstance(x, str) else " ".join(x) for x in values["label"]])
    return Labelled(values["text"], values.get("pair"), values["label"], [location for location, _ in rows])


def _value(location: str, record: dict[str, Any], column: str, role: str) -> str:
    if column not in record:
        raise UserError(f"{location} has no {column}; it has {_names(record)}")
    value = record[column]
    is_empty = role != "pair" and str(value).strip() == ""
    is_text = isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value))
    if is_empty or not is_text:
        what = "empty" if is_empty else json_kind(value)
        raise UserError(f"{location}: {column} is {what}; expected one {role.replace('pair', 'text')}")
    return str(value)


def _label_set(location: str, record: dict[str, Any], columns: list[str], separator: str) -> tuple[str, ...]:
    """Reads the labels of a text from a column of them, or from several columns of 0 and 1."""
    for column in columns:
        if column not in record:
            raise UserError(f"{location} has no {column}; it has {_names(record)}")
    if len(columns) > 1:
        found = {column: str(record[column]).strip().lower() for column in columns}
        if wrong := next((column for column, value in found.items() if value not in _FLAGS), ""):
            raise UserError(f"{location}: {wrong} is '{found[wrong][:20]}'; expected 0 or 1 in each of several columns")
        return tuple(column for column, value in found.items() if _FLAGS[value])
    value = record[columns[0]]
    items = value if isinstance(value, list) else str(value).split(separator)
    is_text = [isinstance(item, str) or type(item) is int for item in items]
    if not all(is_text) or not isinstance(value, str | list | int):
        what = json_kind(value if all(is_text) else items[is_text.index(False)])
        raise UserError(
            f"{location}: {columns[0]} has {what}; expected labels, as a list or separated by '{separator}'"
        )
    return tuple(dict.fromkeys(label for item in items if (label := str(item).strip())))


def _refuse_header(first: tuple[str, dict[str, Any]], texts: list[str], labels: list[str]) -> None:
    """Raises UserError where the first line of a table without header looks like one.

    It does where its label is that of no other line, and either is a usual name, or no number though all others are, or
    stands beside a text of one word though most others have several; or where pandas has numbered the columns.
    """
    location, record = first
    is_number = [re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", label.strip()) is not None for label in labels]
    has_words = [len(text.split()) > 1 for text in texts]
    named = labels[0].strip().lower() in HEADER
    named |= not is_number[0] and all(is_number[1:])
    named |= not has_words[0] and not is_number[0] and 2 * sum(has_words) > len(texts)
    cells = list(filter(None, record.values()))
    if (named and labels[0] not in labels[1:] and len(labels) > 1) or cells == [str(i) for i in range(len(cells))]:
        what = f"{location} looks like a header ({_names(cells)}), and numbers of columns are for tables without one"
        raise UserError(f"{what}; name the columns, by words, or move the line down if it is an example")


def records(source: str, numbered: bool = False, blank_lines: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """Reads (location, column -> value) from every line of a file, or from every example of a TensorFlow Dataset.

    Args:
      numbered: a table has no header; its columns are called 1, 2, 3 ...
      blank_lines: a blank line is a record without columns, or with an empty text in a file of texts; else it is none.

    Raises:
      UserError: it cannot be read, or is empty.
    """
    rows = _tfds(source) if source.startswith("tfds:") else _file(Path(source).expanduser(), numbered, blank_lines)
    if not rows:
        raise UserError(f"{source} has no examples")
    return rows


def _names(record: Iterable[Any]) -> str:
    return ", ".join(map(str, record))


def _file(file: Path, numbered: bool, blank_lines: bool) -> list[tuple[str, dict[str, Any]]]:
    content = files.read_text(file)
    if file.suffix in (".jsonl", ".json", ".txt"):
        all_lines = content.removesuffix("\n").split("\n") if content else []  # splitlines also splits at U+2028
        lines = [(f"{file}:{number}", line) for number, line in enumerate(all_lines, 1) if line.strip() or blank_lines]
        if file.suffix == ".txt":
            return [(where, {"text": line}) for where, line in lines]
        return [(where, _json_object(where, line) if line.strip() else {}) for where, line in lines]
    first_line = content.lstrip("\n").partition("\n")[0]
    delimiter = next((c for c in "\t,;|" if c in first_line), ",")
    has_tabs = delimiter == "\t"
    is_quoted = not has_tabs or quotes_cells(content)
    dialect: dict[str, Any] = {"strict": True} if is_quoted else {"quoting": csv.QUOTE_NONE}
    all_rows = _cells(file, content, delimiter=delimiter, **dialect)
    rows = [(where, row) for where, row in all_rows if row or blank_lines]
    if numbered:
        header = [str(i) for i in range(1, max((len(row) for _, row in rows), default=0) + 1)]
    else:
        header = [name.strip() for name in rows.pop(0)[1]] if rows else []
        if twice := next((name for name in header if name and header.count(name) > 1), ""):
            raise UserError(f"{file}:1 has the column '{twice}' twice; rename or remove one")
        for where, row in rows:
            if len(row) > len(header):
                what = f"{where} has {len(row)} columns, and the first line {len(header)}"
                inside = "a tab, replace it" if has_tabs else f"'{delimiter}', put it into double quotes"
                others = "name all columns in the first line, or number them if that is no header"
                raise UserError(f"{what}; where a text holds {inside}; else {others}")
    return [(where, dict(zip(header, row, strict=False))) for where, row in rows]


def quotes_cells(text: str, is_whole: bool = True) -> bool:
    """Returns whether the quotes of a table with tabs enclose cells. They are text, as in GLUE, unless only a writer
    that quotes cells can have made them.

    It can where reading quotes makes the number of columns even, or where every quote is in a quoted cell, and cells
    have doubled quotes or the whole first line is quoted.

    Args:
      is_whole: otherwise the text is the first lines of a table.
    """
    csv.field_size_limit(FIELD_CHARS)
    rows: list[list[str]] = []
    try:
        plain = list(csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
        cells = [cell for row in plain for cell in row if '"' in cell]
        if all(re.fullmatch(r'"([^"]|"")*"', cell) for cell in cells):
            first = next(filter(None, plain), [])
            quoted = any('""' in cell[1:-1] for cell in cells) or (bool(first) and all(c[:1] == '"' for c in first))
        else:
            quoted = bool(cells) and len({len(row) for row in plain if row}) > 1
        for row in csv.reader(io.StringIO(text), delimiter="\t", strict=True) if quoted else ():
            rows.append(row)
    except csv.Error as e:
        if is_whole or "unexpected end of data" not in str(e):
            return False
    return len({len(row) for row in rows if row}) == 1


def _cells(file: Path, content: str, **dialect: Any) -> list[tuple[str, list[str]]]:
    """Splits a table into rows of cells, from the first row that has some, with their locations. Raises UserError."""
    csv.field_size_limit(FIELD_CHARS)
    reader, line = csv.reader(io.StringIO(content), **dialect), 1
    rows: list[tuple[str, list[str]]] = []
    try:
        for row in reader:
            if row or rows:
                rows.append((f"{file}:{line}", row))
            line = reader.line_num + 1
    except csv.Error as e:
        raise UserError(f"{file}:{line} is not CSV: {e}; double the quotes inside a quoted text") from e
    return rows


def _json_object(where: str, line: str) -> dict[str, Any]:
    with as_user_error(f"{where} is not JSON on one line: ", ValueError, RecursionError):
        record = json.loads(line, object_pairs_hook=_unique)
    if re.search(r"\\u[dD]", line):  # JSON escapes may hold lone surrogates, which UTF-8 cannot encode
        whole = json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass")
        record = json.loads(whole.decode(errors="replace"))
    if not isinstance(record, dict):
        raise UserError(f"{where} is {json_kind(record)}; expected a JSON object a line")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key occurs twice among {_names(key for key, _ in pairs)}")
    return dict(pairs)


def _tfds(source: str) -> list[tuple[str, dict[str, Any]]]:
    builder, split = prepared_tfds(f"'{source}' cannot be read", source.removeprefix("tfds:"))
    records = []
    for i, example in enumerate(builder.as_dataset(split=split).as_numpy_iterator()):
        records.append((f"{source}[{i}]", {key: _plain(value) for key, value in example.items()}))
    return records


def _plain(value: Any) -> Any:
    """Converts bytes to text, and NumPy's numbers and arrays to Python's."""
    return value.decode(errors="replace") if isinstance(value, bytes) else getattr(value, "tolist", lambda: value)()
