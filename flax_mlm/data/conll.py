"""Tagged sentences in CoNLL format: a token a line, its tag in the last column, a blank line between sentences."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from flax_mlm.errors import UserError
from flax_mlm.storage import files


class Tagged(NamedTuple):
    """N sentences: their words and the words' tags."""

    words: list[list[str]]
    tags: list[list[str]]

    def take(self, numbers: Iterable[int]) -> "Tagged":
        """Some of them."""
        some = list(numbers)
        return Tagged([self.words[i] for i in some], [self.tags[i] for i in some])


def read(path: str) -> Tagged:
    """Reads a file, and makes BIO of its tags.

    IO, BIO (either kind) and BIOES are understood.

    Raises:
      UserError: it cannot be read, holds nothing, or a line is none; the message names it.
    """
    file = Path(path).expanduser()
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    for number, line in enumerate(files.read_text(file).split("\n"), 1):
        fields = re.findall(r"[^ \t]+", line)  # a token may hold other kinds of space
        if not fields or fields[0] == "-DOCSTART-":
            words.append([])
            tags.append([])
            continue
        tag = fields[-1]
        if len(fields) < 2 or not (tag == "O" or (tag[:2] in ("B-", "I-", "E-", "S-") and len(tag) > 2)):
            raise UserError(f"{file}:{number} is '{line[:60]}'; it takes a token and a tag such as O, B-PER, I-PER")
        words[-1].append(fields[0])
        tags[-1].append(tag)
    whole = [i for i, sentence in enumerate(words) if sentence]
    if not whole:
        raise UserError(f"{file} holds no tagged sentences")
    return Tagged([words[i] for i in whole], [to_bio(tags[i]) for i in whole])


def to_bio(tags: list[str]) -> list[str]:
    """BIO2: every entity begins with B. An I that continues nothing of its kind begins one."""
    result, before = [], "O"
    for tag in tags:
        if tag[0] in "IE" and before != "O" and before[2:] == tag[2:] and before[0] in "BI":
            result.append(f"I-{tag[2:]}")
        else:
            result.append(tag if tag == "O" else f"B-{tag[2:]}")
        before = tag if tag[0] != "E" and tag[0] != "S" else "O"
    return result
