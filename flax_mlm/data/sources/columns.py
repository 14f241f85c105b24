r"""Columns that `#...` names in a format that has some: one column, a field `a.b` of nested ones, or a template of
several, such as `#{title}\n{text}`.

What has no text is left out and counted: `null_documents`, `missing_documents` (the record has no such column),
`non_string_documents` and `empty_documents`. In a template, a column that is null or missing stands for empty text
(`incomplete_documents`), as long as another one has text.
"""

import dataclasses
import itertools
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flax_mlm.data.text import CHUNK_CHARS, cut, decode
from flax_mlm.errors import UserError, did_you_mean

DEFAULT = "text"
MISSING: Any = object()  # in place of the value of a column that a record does not have
# What is counted -> what it means, for people.
LOST = {
    "null_documents": "documents are null and were left out",
    "missing_documents": "documents were left out, as their records do not have the column",
    "non_string_documents": "documents are numbers, lists or objects in place of text and were left out",
    "incomplete_documents": "documents lack a column of the template, which is empty there",
}
_MAX_NAMES = 40  # in an error
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns that make a document.

    Attributes:
      parts: literal text and names of columns by turns.
    """

    parts: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return self.parts[1::2]

    def document(self, values: Iterable[Any], counts: Counter[str]) -> str | None:
        """Joins the values of the columns; None: there is no document, which is counted, unless its text is empty."""
        texts = list(values)
        if len(texts) == 1 and len(self.parts[0]) + len(self.parts[2]) == 0 and isinstance(texts[0], str):
            return texts[0]
        absent = [text for text in texts if text is None or text is MISSING]
        if any(not isinstance(text, str) for text in texts if text is not None and text is not MISSING):
            counts["non_string_documents"] += 1
            return None
        if len(absent) == len(texts):
            counts["missing_documents" if all(text is MISSING for text in absent) else "null_documents"] += 1
            return None
        texts = [text if isinstance(text, str) else "" for text in texts]
        if not any(text.strip() for text in texts):
            return ""
        counts["incomplete_documents"] += bool(absent)
        return "".join(a + b for a, b in itertools.zip_longest(self.parts[::2], texts, fillvalue=""))


def parse(spec: str, text: str) -> Columns | None:
    """Reads what stands behind the `#` of a source; None: nothing. Raises UserError."""
    if not text:
        return None
    if not re.search(r"[{}]", text):
        return Columns(("", text, ""))
    parts = [""]
    for token in re.findall(r"\{\{|\}\}|\{[^{}]+\}|\\[nt\\]|(?s:.)", text):
        if token in "{}":
            what = f"data.source is '{spec}'; '{text}' has a brace that is not closed or opened"
            raise UserError(f"{what}; expected names of columns in braces, as in {{title}}\\n{{text}}, or {{{{ for one")
        if token[0] == "{" and token != "{{":
            parts += [token[1:-1], ""]
        else:
            parts[-1] += token[0] if token in ("{{", "}}") else _ESCAPES.get(token, token)
    if len(parts) == 1:
        raise UserError(f"data.source is '{spec}'; '{text}' names no column; expected one in braces: {{text}}")
    return Columns(tuple(parts))


def chosen(
    columns: Columns | None, where: str, names: Iterable[str], texts: Iterable[str], kind: str = "column"
) -> Columns:
    """Returns the columns; where none are named, `text`, or else the only column of text.

    Args:
      where: file, for the error.
      kind: what people call a column of this format.
      names: of the columns that there are.
      texts: those of text.

    Raises:
      UserError: it is not clear which column is meant.
    """
    if columns:
        return columns
    names, texts = list(names), list(texts)
    name = DEFAULT if DEFAULT in names else texts[0] if len(texts) == 1 else ""
    if not name:
        what = f"{where} has no {kind} '{DEFAULT}', and it is not clear which other one is the text"
        raise UserError(f"{what}; it has {_listed(names)}; name the {kind}, as in GLOB#{kind}")
    return Columns(("", name, ""))


def no_column(where: str, name: str, names: Iterable[str], kind: str = "column") -> UserError:
    """Makes the error about a column that is not there."""
    names = list(names)
    hint = did_you_mean(name, names, f"name one of them, as in GLOB#{kind}")
    return UserError(f"{where} has no {kind} '{name}'; it has {_listed(names)}; {hint}")


def _listed(names: list[str]) -> str:
    """Names columns on one line."""
    short = [textwrap.shorten(name, 60, placeholder=" ...") for name in names[:_MAX_NAMES]]
    return ", ".join([*short, *["..."] * (len(names) > _MAX_NAMES)]) or "none"


def lookup(record: Mapping[str, Any], name: str) -> Any:
    """Finds a column, or a field of nested ones by its path with dots; a column whose name has dots goes first.

    A field of null is null; what is not there is `MISSING`.
    """
    if name in record:
        return record[name]
    for dot in re.finditer(r"\.", name):
        head = record.get(name[: dot.start()], MISSING)
        if head is None:
            return None
        if isinstance(head, Mapping) and (value := lookup(head, name[dot.end() :])) is not MISSING:
            return value
    return MISSING


def document_chunks(text: str, counts: Counter[str]) -> Iterator[str]:
    """Cuts a document into chunks; an empty one is counted."""
    if not text.strip():
        counts["empty_documents"] += 1
        return
    if not text.isascii():  # JSON escapes may hold lone surrogates, which UTF-8 cannot encode
        text = decode(text.encode(errors="surrogatepass"), counts)
    yield from cut(text, CHUNK_CHARS)


def lost(counts: Mapping[str, int]) -> list[str]:
    """Says which documents were left out or are incomplete, a line for each kind."""
    return [f"{counts[kind]:,} {what}" for kind, what in LOST.items() if counts.get(kind)]
