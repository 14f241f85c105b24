"""Text from files, decompressed, decoded and cut into chunks of bounded size."""

import bz2
import codecs
import gzip
import io
import lzma
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, BinaryIO

from flax_mlm.errors import UserError

CHUNK_CHARS = 1 << 16
UTF_8 = "utf-8"

_DECOMPRESS = "decompress it, or compress it with gzip, zstd, bzip2 or xz and end its name in .gz, .zst, .bz2 or .xz"
_UNPACK = "unpack it, and give the files in it"
_CONVERT = "write its text as JSON lines, and use jsonl:GLOB#field"
_ARCHIVES = {".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".tlz"}
WIKIEXTRACTOR = "WikiExtractor's output with its tags <doc ...>"
_EXTRACT = "use `wikiextractor` and wikiextractor:GLOB"
_GET_TEXT = "give files of plain text"
# What a file that is no plain text begins with -> its name, and what to do.
_SIGNATURES = (
    (rb"\x1f\x8b", "compressed by gzip", _DECOMPRESS),
    (rb"\x28\xb5\x2f\xfd", "compressed by zstd", _DECOMPRESS),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "compressed by bzip2", _DECOMPRESS),
    (rb"\xfd7zXZ\0", "compressed by xz", _DECOMPRESS),
    (rb"\x5d\0\0[\0-\xff]{2}", "compressed by lzma", _DECOMPRESS),
    (rb"\x04\x22\x4d\x18|LZIP\x01|\xff\x06\0\0sNaPpY|\x1f\x9d", "compressed", _DECOMPRESS),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a zip archive, or a file of an office program", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (rb"[\0-\xff]{257}ustar", "a tar archive", _UNPACK),
    (rb"PAR1", "a Parquet file", "use parquet:GLOB#column"),
    (rb"ARROW1\0|\xff\xff\xff\xff", "an Arrow file", "use arrow:GLOB#column"),
    (rb"ORC[\x01-\x1f]|Obj\x01|SQLite format 3\0|\x89HDF|\x93NUMPY", "a table or database", _CONVERT),
    (rb"\x80[\x02-\x05][\x95\]}(cX\x8a\x8c]", "a pickle", _CONVERT),
    (rb"%PDF-", "a PDF", _GET_TEXT),
    (rb"\{\\rtf", "an RTF document", _GET_TEXT),
    (rb"(?i:\s*(<!--.{0,999}?-->\s*)*(<!doctype\s+html\b|<html[\s>]))", "a web page", "extract its text"),
    (rb"(<\?xml[^>]*>\s*)?<mediawiki\s", "a dump of MediaWiki", _EXTRACT),
    (rb"\s*<doc id=[^>]*\surl=[^>]*>", WIKIEXTRACTOR, "use wikiextractor:GLOB"),
    (rb"version https://git-lfs\.github\.com", "a Git LFS pointer, not the file itself", "run: git lfs pull"),
)
# Ending of a name -> the program that compresses such files, and what they begin with.
_COMPRESSED = {
    ".gz": ("gzip", rb"\x1f\x8b"),
    ".zst": ("zstd", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    ".bz2": ("bzip2", rb"BZh"),
    ".xz": ("xz", rb"\xfd7zXZ\0"),
}
_CONTROL = bytes({*range(32)} - {*b"\t\n\v\f\r\x1b"})
_MAX_FOREIGN = 0.1  # fraction of a file's beginning that is no UTF-8 text: Latin-1 in German has 0.02, noise 0.5
_MIN_HEAD = 64  # bytes to judge from


def cut(text: str, limit: int) -> Iterator[str]:
    """Cuts text into strings of at most `limit` characters, before whitespace where there is any.

    The strings, joined, are the text again.
    """
    start = 0
    while len(text) - start > limit:
        space = max(text.rfind(" ", start + 1, start + limit + 1), text.rfind("\n", start + 1, start + limit + 1))
        end = space if space > start else start + limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def decode(data: bytes, counts: Counter[str]) -> str:
    """Decodes UTF-8; other bytes become U+FFFD and are counted as `undecodable_bytes`, and NUL as `nul_bytes`."""
    if b"\0" in data:
        counts["nul_bytes"] += data.count(b"\0")
    try:
        return data.decode()
    except UnicodeDecodeError:
        counts["undecodable_bytes"] += len(data) - len(data.decode(errors="ignore").encode())
        return data.decode(errors="replace")


def line_chunks(file: BinaryIO, counts: Counter[str], start: int = 0) -> Iterator[tuple[int, str, bool]]:
    r"""Reads lines in chunks of at most about `CHUNK_CHARS`.

    Args:
      start: offset at which the file is, the beginning of a line.

    Yields:
      (offset of the chunk's first byte, text, whether the line ends here). Newlines become \n.
    """
    rest, offset = b"", start  # bytes that belong to the next chunk; bytes read
    while data := file.readline(CHUNK_CHARS - len(rest)):
        offset += len(data)
        data = rest + data
        rest = b""
        begin = offset - len(data)
        if not begin:
            data = data.removeprefix(codecs.BOM_UTF8)
        ends = data.endswith(b"\n") or len(data) < CHUNK_CHARS // 2
        if not ends:  # keep what follows the last space, or else the last whole character, for the next chunk
            end = data.rfind(b" ", 1)
            data, rest = _whole_characters(data) if end < CHUNK_CHARS // 2 else (data[:end], data[end:])
        text = decode(data, counts)
        yield begin, (text[:-2] + "\n" if text.endswith("\r\n") else text), ends
    if rest:
        yield offset - len(rest), decode(rest, counts), True


def blocks(file: BinaryIO, counts: Counter[str], size: int = 1 << 20) -> Iterator[str]:
    """Reads text in blocks of about `size` bytes, which end anywhere but inside a character."""
    rest, is_first = b"", True
    while data := file.read(size):
        data, rest = _whole_characters(rest + data)
        data, is_first = data.removeprefix(codecs.BOM_UTF8) if is_first else data, False
        yield decode(data, counts)
    if rest:
        yield decode(rest, counts)


def _whole_characters(data: bytes) -> tuple[bytes, bytes]:
    """Cuts off the character that may be unfinished at the end."""
    end = len(data)
    while end > len(data) - 3 and end and data[end - 1] & 0xC0 == 0x80:
        end -= 1
    end -= bool(end) and data[end - 1] >= 0xC0
    return data[:end], data[end:]


def to_next_line(file: BinaryIO, offset: int) -> int:
    """Moves to the first line that begins at this offset or later. Returns where it begins."""
    if offset:
        file.seek(offset - 1)
        while (data := file.readline(CHUNK_CHARS)) and not data.endswith(b"\n"):
            pass
    return file.tell() if offset else 0


def opened(
    name: str, raw: Any, encoding: str = UTF_8, counts: Counter[str] | None = None, accepted: str = ""
) -> BinaryIO:
    """Opens the text of a file as UTF-8. The file is compressed if its name ends in .gz, .zst, .bz2 or .xz.

    Where lines end in carriage returns alone, those become newlines.

    Args:
      name: path of the file.
      encoding: of the file, unless it has a byte-order mark of UTF-16 or UTF-32. Where text with such a mark is
        damaged, reading raises UnicodeError; what another encoding lacks is added to counts["undecodable_bytes"].
      accepted: kind of file that is refused otherwise, such as `WIKIEXTRACTOR`.

    Raises:
      UserError: by its beginning, it is no text, or text with markup or in another encoding.
    """
    file: Any = raw
    suffix = PurePath(name).suffix
    if suffix in _ARCHIVES:
        raise UserError(f"{name} is a tar archive by its name; expected plain text; {_UNPACK}")
    if suffix in _COMPRESSED:
        _check_compressed(name, raw.peek(6))
        file = _decompressed(suffix, raw)
    head = file.peek(4)
    if marked := _marked_encoding(head):
        text: Any = codecs.iterdecode(iter(lambda: file.read(CHUNK_CHARS), b""), marked)
    elif encoding != UTF_8:
        _refuse_foreign(name, head, is_utf_8=False)
        text = _decoded(file, encoding, Counter() if counts is None else counts)
    else:
        _refuse_foreign(name, head, accepted=accepted)
        return _with_newlines(file)
    return _with_newlines(_reader(part.encode() for part in text))


def divisible(name: str, raw: Any, encoding: str) -> bool:
    """Returns whether reading may begin at any line of a file: it is neither compressed nor decoded."""
    return PurePath(name).suffix not in _COMPRESSED and encoding == UTF_8 and not _marked_encoding(raw.peek(4))


def _marked_encoding(head: bytes) -> str:
    """The encoding that a byte-order mark says; empty for UTF-8 and where there is none."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""


def _decoded(file: BinaryIO, encoding: str, counts: Counter[str]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    while data := file.read(CHUNK_CHARS):
        text = decoder.decode(data)
        counts["undecodable_bytes"] += text.count("\ufffd")
        yield text
    yield decoder.decode(b"", final=True)


def _decompressed(suffix: str, raw: Any) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".zst":
        return _reader(_zstd_blocks(raw))
    return bz2.BZ2File(raw) if suffix == ".bz2" else lzma.LZMAFile(raw)


def _check_compressed(name: str, head: bytes) -> None:
    suffix = PurePath(name).suffix
    program, begins = _COMPRESSED[suffix]
    if head and not re.match(begins, head):
        _refuse_foreign(name, head)
        what = f"{name} is not compressed by {program}, as its first bytes show"
        raise UserError(f"{what}; if it is plain text, take {suffix} from its name")


def refuse_other(name: str, head: bytes, expected: str = "plain text", unless: str = "") -> None:
    """Raises UserError if a file begins like one of another kind, except for that with `unless` in its name."""
    for pattern, what, remedy in _SIGNATURES:
        if re.match(pattern, head) and not (unless and unless in what):
            raise UserError(f"{name} is {what}; expected {expected}; {remedy}")


def _refuse_foreign(name: str, head: bytes, is_utf_8: bool = True, accepted: str = "") -> None:
    head = head.removeprefix(codecs.BOM_UTF8)
    refuse_other(name, head, unless=accepted)
    if not is_utf_8:
        return
    text = head.decode(errors="ignore").encode().translate(None, _CONTROL)
    foreign = 1 - len(text) / max(len(head), 1)
    if len(head) >= _MIN_HEAD and foreign > _MAX_FOREIGN:
        what = f"{name} is no text in UTF-8, as {foreign:.0%} of its first bytes show; expected UTF-8"
        remedy = "name its encoding (data.encoding=gb18030), or leave it out if it is no text"
        raise UserError(f"{what}; {remedy}")


def _with_newlines(file: Any) -> BinaryIO:
    """Turns carriage returns into newlines if the file begins without a newline."""
    head = file.peek(4)
    if b"\r" not in head or b"\n" in head:
        return file
    return io.BufferedReader(_Newlines(file), 1 << 20)  # type: ignore[return-value]


class _Newlines(io.RawIOBase):
    """Reads carriage returns that no newline follows as newlines; offsets stay the same."""

    def __init__(self, file: Any):
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        if data.endswith(b"\r") and self._file.peek(1)[:1] != b"\n":
            data = data[:-1] + b"\n"
        buffer[: len(data)] = re.sub(rb"\r(?!\n|\Z)", b"\n", data)
        return len(data)


def _reader(blocks: Iterator[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_BlockReader(blocks), 1 << 20)


class _BlockReader(io.RawIOBase):
    """Reads blocks of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._block, self._position = blocks, b"", 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._block = self._block or next(self._blocks, b"")
        n = min(len(buffer), len(self._block))
        buffer[:n], self._block = self._block[:n], self._block[n:]
        self._position += n
        return n


def _zstd_blocks(raw: BinaryIO) -> Iterator[bytes]:
    """Decompresses any number of frames; unlike for zstandard's own reader, an early end is an error."""
    import zstandard  # only where such a file is read

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None  # that has begun and not ended
    rest = b""  # compressed bytes after the end of a frame
    while compressed := rest or raw.read(1 << 16):
        frame = frame or decompressor.decompressobj()
        try:
            block = frame.decompress(compressed)
        except zstandard.ZstdError as e:
            raise OSError(str(e)) from e
        rest, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if block:
            yield block
    if frame:
        raise EOFError("it ends inside a compressed frame")
