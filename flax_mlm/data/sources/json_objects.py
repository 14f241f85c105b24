"""Documents from JSON lines."""

import functools
import json
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from flax_mlm.data.sources.files import File
from flax_mlm.data.text import CHUNK_CHARS, cut, decode
from flax_mlm.errors import UserError, json_kind

_JSON_LINES = "a JSON object a line; `jq -c '.[]'` makes lines of a list, and `jq -c .` of objects"


def json_lines(
    file: File, text: BinaryIO, counts: Counter[str], start: int, end: int, field: str
) -> Iterator[tuple[int, str]]:
    """Reads the string `field` of the objects whose lines begin in a range."""
    begin = start
    for line in text:
        offset, begin = begin, begin + len(line)
        if offset >= end:
            return
        if not line.strip():
            continue
        name = functools.partial(_name, file, offset)
        try:
            record = json.loads(decode(line, counts).removeprefix("\ufeff"))
        except (ValueError, RecursionError) as e:
            raise UserError(f"{name()} is not JSON: {e}; expected {_JSON_LINES}") from e
        if not isinstance(record, dict):
            raise UserError(f"{name()} is {json_kind(record)}; expected {_JSON_LINES}")
        content = record.get(field)
        if not isinstance(content, str):
            has = f"'{field}' is {json_kind(content)}" if field in record else f"it has {', '.join(map(repr, record))}"
            remedy = 'leave the line out, or write ""' if field in record else "name the field, as in jsonl:GLOB#field"
            raise UserError(f"{name()} has no string field '{field}' ({has}); {remedy}")
        yield from ((offset, chunk) for chunk in document_chunks(content, counts))


def _name(file: File, offset: int) -> str:
    """The number of a line, which is known only where it is counted."""
    from flax_mlm.data.text import opened

    with file.reading() as raw:
        text, number, left = opened(file.path, raw), 1, offset
        while left and (data := text.read(min(left, 1 << 20))):
            left -= len(data)
            number += data.count(b"\n")
    return f"{file.path}:{number}"


def document_chunks(text: str, counts: Counter[str]) -> Iterator[str]:
    """Cuts a document into chunks; an empty one is counted."""
    if not text.strip():
        counts["empty_documents"] += 1
        return
    if not text.isascii():  # JSON escapes may hold lone surrogates, which UTF-8 cannot encode
        text = decode(text.encode(errors="surrogatepass"), counts)
    yield from cut(text, CHUNK_CHARS)
