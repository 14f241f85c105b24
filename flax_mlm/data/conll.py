"""Tagged sentences in CoNLL format: a token a line, its tag in the last column, a blank line between sentences."""

import re
from pathlib import Path
from typing import NamedTuple

from flax_mlm.errors import UserError
from flax_mlm.storage import files


class Tagged(NamedTuple):
    """Words and tags of N sentences."""

    words: list[list[str]]
    tags: list[list[str]]


def read(path: str) -> Tagged:
    """Reads a file with IO, BIO (IOB1 or IOB2) or BIOES tags, and converts the tags to BIO (IOB2).

    Raises:
      UserError: it cannot be read, is empty, or a line is invalid; the message names it.
    """
    file = Path(path).expanduser()
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    for number, line in enumerate(files.read_text(file).split("\n"), 1):
        fields = re.findall(r"[^ \t]+", line)  # a token may contain other kinds of space
        if not fields or fields[0] == "-DOCSTART-":
            words.append([])
            tags.append([])
            continue
        tag = fields[-1]
        if len(fields) < 2 or not (tag == "O" or (tag[:2] in ("B-", "I-", "E-", "S-") and len(tag) > 2)):
            raise UserError(f"{file}:{number} is '{line[:60]}'; expected a token and a tag such as O, B-PER, I-PER")
        words[-1].append(fields[0])
        tags[-1].append(tag)
    whole = [i for i, sentence in enumerate(words) if sentence]
    if not whole:
        raise UserError(f"{file} has no tagged sentences")
    return Tagged([words[i] for i in whole], [to_bio(tags[i]) for i in whole])


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
