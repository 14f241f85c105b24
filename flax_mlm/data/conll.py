"""Tagged sentences in CoNLL format: a token with its columns a line, and a blank line between sentences."""

import re
import statistics
from pathlib import Path
from typing import NamedTuple

from flax_mlm.errors import UserError
from flax_mlm.storage import files

# First letters of tags in BIO, BIOES, BILOU and BMES(W): the beginning, inside or end of an entity, or all of it.
_PREFIXES = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S", "W": "S"}
_TAG = re.compile(rf"O|[{''.join(_PREFIXES)}](-.+)?")


class Tagged(NamedTuple):
    """Words and tags of N sentences."""

    words: list[list[str]]
    tags: list[list[str]]


def read(path: str, columns: str = "") -> Tagged:
    """Reads tagged sentences; skips `-DOCSTART-`, comments before a sentence, and ranges of tokens as in CoNLL-U.

    Tags are IO, BIO (IOB1 or IOB2), BIOES, BILOU or BMES, and are converted to BIO (IOB2), `B` to `B-entity`.

    Args:
      columns: `TOKEN,TAG`, numbers from 1; empty: the first and the last.

    Raises:
      UserError: it cannot be read, is empty, or a line is invalid; the message names it. Or `columns` is.
    """
    file, at = Path(path).expanduser(), _parse_columns(columns)
    lines = [line.strip(" \t") for line in files.read_text(file).split("\n")]
    rows = [line for line in lines if line and not line.startswith(("#", "-DOCSTART-"))]
    separator = r"\t" if all("\t" in row for row in rows) else r"[ \t]+"  # a token may contain other kinds of space
    width = statistics.mode([len(re.split(separator, row)) for row in rows] or [0])
    sentences: list[list[tuple[str, str]]] = [[]]
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("-DOCSTART-"):
            sentences.append([])
            continue
        fields = re.split(f" *{separator} *", line)
        word, tag = (fields[i] if i < len(fields) else "" for i in at)
        is_valid = len(fields) > 1 and _TAG.fullmatch(tag)
        is_comment = fields[0].startswith("#") and (len(fields) != width or (line[:2] == "# " and not is_valid))
        is_range = at[0] > 0 and re.fullmatch(r"\d+[-.]\d+", fields[0])
        if is_range or (is_comment and not sentences[-1]):
            continue
        if not is_valid or not word:
            expected = "a token and a tag such as O, B-PER, I-PER; --columns=TOKEN,TAG chooses other columns"
            raise UserError(f"{file}:{number} is '{line[:60]}'; expected {expected}")
        if not columns and len(fields) != width:
            what = f"{file}:{number} has {len(fields)} columns, and most lines {width}"
            raise UserError(f"{what}; correct it, or choose columns with --columns=TOKEN,TAG")
        sentences[-1].append((word, tag if tag == "O" else _PREFIXES[tag[0]] + (tag[1:] or "-entity")))
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise UserError(f"{file} has no tagged sentences")
    words, tags = ([[pair[i] for pair in sentence] for sentence in sentences] for i in (0, 1))
    if all(word.isdecimal() for some in words for word in some):
        raise UserError(f"{file}: column {at[0] + 1} has numbers alone; choose columns with --columns=TOKEN,TAG")
    return Tagged(words, [to_bio(some) for some in tags])


def _parse_columns(columns: str) -> tuple[int, int]:
    """Parses `TOKEN,TAG` to indices from 0, -1 for the last. Raises UserError."""
    found = re.fullmatch(r"([1-9]\d*), *([1-9]\d*)", columns or "1,1")
    if not found or (columns and int(found[1]) == int(found[2])):
        raise UserError(f"--columns is '{columns}'; expected the numbers of the token's and the tag's column, as 1,4")
    return int(found[1]) - 1, int(found[2]) - 1 if columns else -1


def to_bio(tags: list[str]) -> list[str]:
    """Converts IO, BIO or BIOES to IOB2: every entity begins with B, also at an I that continues none of its kind."""
    result, before = [], "O"
    for tag in tags:
        if tag[0] in "IE" and before != "O" and before[2:] == tag[2:] and before[0] in "BI":
            result.append(f"I-{tag[2:]}")
        else:
            result.append(tag if tag == "O" else f"B-{tag[2:]}")
        before = tag if tag[0] != "E" and tag[0] != "S" else "O"
    return result
