"""Labelled texts and pairs of texts from files: tables (tabs, or CSV), JSON lines, lines of text (.txt), and prepared
TensorFlow Datasets; and tagged sentences in CoNLL format."""

import csv
import io
import json
import re
from collections.abc import Iterable
from itertools import dropwhile
from operator import not_
from pathlib import Path
from typing import Any, NamedTuple

from flax_mlm.data.tf import prepared_tfds
from flax_mlm.errors import UserError, as_user_error
from flax_mlm.storage import files

_TEXT = ("sentence", "text", "sentence1", "premise", "question", "question1")
_PAIR = ("sentence2", "hypothesis", "question2", "text2")
LABEL = ("label", "score", "labels")


class Labelled(NamedTuple):
    """N texts with their labels as strings."""

    texts: list[str]
    pairs: list[str] | None  # second texts
    labels: list[str]


class Tagged(NamedTuple):
    """Words and tags of N sentences."""

    words: list[list[str]]
    tags: list[list[str]]


def take(columns: Any, indices: Iterable[int]) -> Any:
    """Selects rows of a NamedTuple of columns; columns that are None stay so."""
    rows = list(indices)
    return type(columns)(*(None if column is None else [column[i] for i in rows] for column in columns))


def read(source: str, text: str = "", pair: str = "", label: str = "") -> Labelled:
    """Reads labelled texts from a file, or from `tfds:NAME[/config]:split`.

    Args:
      text, pair, label: names of the columns, or their numbers from 1 in a table without header; empty: the usual names
        (`sentence`, `sentence1` and `sentence2`, `label` and the like).

    Raises:
      UserError: it cannot be read, is empty, or lacks a column; the message names the file and the line.
    """
    rows = records(source, numbered=(text or label).isdecimal())
    first = rows[0][1]
    if not text and not pair:
        candidates = [name for name in _TEXT if name in first]
        if len(candidates) > 1 and not any(name in first for name in _PAIR):
            raise UserError(f"{source} has columns {' and '.join(candidates)}; choose with --text and --pair")
    roles = {"text": (text, _TEXT), "pair": (pair, _PAIR), "label": (label, LABEL)}
    columns = {role: name or next((n for n in usual if n in first), "") for role, (name, usual) in roles.items()}
    for role in ("text", "label"):
        if not columns[role]:
            raise UserError(f"{source} has columns {_names(first)}; name the column of the {role} with --{role}=NAME")
    values: dict[str, list[str]] = {role: [] for role, column in columns.items() if column}
    for location, record in rows:
        for role, column_values in values.items():
            value = record.get(columns[role])
            if value is None or (role != "pair" and str(value).strip() == ""):
                raise UserError(f"{location} has no {columns[role]}; it has {_names(record)}")
            column_values.append(str(value))
    return Labelled(values["text"], values.get("pair"), values["label"])


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


def _names(record: dict[str, Any]) -> str:
    return ", ".join(map(str, record))


def _file(file: Path, numbered: bool, blank_lines: bool) -> list[tuple[str, dict[str, Any]]]:
    content = files.read_text(file)
    if file.suffix in (".jsonl", ".json", ".txt"):
        all_lines = content.removesuffix("\n").split("\n") if content else []  # splitlines also splits at U+2028
        lines = [(f"{file}:{number}", line) for number, line in enumerate(all_lines, 1) if line.strip() or blank_lines]
        if file.suffix == ".txt":
            return [(where, {"text": line}) for where, line in lines]
        return [(where, _json_object(where, line) if line.strip() else {}) for where, line in lines]
    has_tabs = "\t" in content.partition("\n")[0]
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if has_tabs else {}
    csv.field_size_limit(1 << 24)
    reader = csv.reader(io.StringIO(content), **dialect)
    rows = [(f"{file}:{reader.line_num}", row) for row in dropwhile(not_, reader) if row or blank_lines]
    if numbered:
        header = [str(i) for i in range(1, max((len(row) for _, row in rows), default=0) + 1)]
    else:
        header = [name.strip() for name in rows.pop(0)[1]] if rows else []
        for where, row in rows:
            if len(row) > len(header):
                what = f"{where} has {len(row)} columns, and the first line {len(header)}"
                raise UserError(f"{what}; put text with a comma into double quotes")
    return [(where, dict(zip(header, row, strict=False))) for where, row in rows]


def _json_object(where: str, line: str) -> dict[str, Any]:
    with as_user_error(f"{where} is not JSON: ", ValueError):
        record = json.loads(line)
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object")
    return record


def _tfds(source: str) -> list[tuple[str, dict[str, Any]]]:
    builder, split = prepared_tfds(f"'{source}' cannot be read", source.removeprefix("tfds:"))
    records = []
    for i, example in enumerate(builder.as_dataset(split=split).as_numpy_iterator()):
        plain = {k: v.decode(errors="replace") if isinstance(v, bytes) else v for k, v in example.items()}
        records.append((f"{source}[{i}]", plain))
    return records


def read_tagged(path: str) -> Tagged:
    """Reads tagged sentences: a token a line, its tag in the last column, a blank line between sentences.

    Tags are IO, BIO (IOB1 or IOB2) or BIOES, and are converted to BIO (IOB2).

    Raises:
      UserError: it cannot be read, is empty, or a line is invalid; the message names it.
    """
    file = Path(path).expanduser()
    sentences: list[list[tuple[str, str]]] = [[]]
    for number, line in enumerate(files.read_text(file).split("\n"), 1):
        fields = re.findall(r"[^ \t]+", line)  # a token may contain other kinds of space
        if not fields or fields[0] == "-DOCSTART-":
            sentences.append([])
            continue
        tag = fields[-1]
        if len(fields) < 2 or not (tag == "O" or (tag[:2] in ("B-", "I-", "E-", "S-") and len(tag) > 2)):
            raise UserError(f"{file}:{number} is '{line[:60]}'; expected a token and a tag such as O, B-PER, I-PER")
        sentences[-1].append((fields[0], tag))
    if not any(sentences):
        raise UserError(f"{file} has no tagged sentences")
    words = [[word for word, _ in sentence] for sentence in sentences if sentence]
    return Tagged(words, [to_bio([tag for _, tag in sentence]) for sentence in sentences if sentence])


def to_bio(tags: list[str]) -> list[str]:
    """Converts tags to IOB2, where every entity begins with B; an I that continues no entity of its kind begins one."""
    result, before = [], "O"
    for tag in tags:
        if tag[0] in "IE" and before != "O" and before[2:] == tag[2:] and before[0] in "BI":
            result.append(f"I-{tag[2:]}")
        else:
            result.append(tag if tag == "O" else f"B-{tag[2:]}")
        before = tag if tag[0] != "E" and tag[0] != "S" else "O"
    return result
