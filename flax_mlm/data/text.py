"""Text from files, decompressed, decoded and cut into chunks of bounded size."""

import codecs
import gzip
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_CHARS = 1 << 16


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


def line_chunks(file: BinaryIO, counts: Counter[str]) -> Iterator[tuple[int, str, bool]]:
    r"""Reads lines in chunks of at most about `CHUNK_CHARS`.

    Yields:
      (offset of the chunk's first byte, text, whether the line ends here). Newlines become \n.
    """
    rest, offset = b"", 0  # bytes that belong to the next chunk; bytes read
    while data := file.readline(CHUNK_CHARS - len(rest)):
        offset += len(data)
        data = rest + data
        rest = b""
        start = offset - len(data)
        if not start:
            data = data.removeprefix(b"\xef\xbb\xbf")
        ends = data.endswith(b"\n") or len(data) < CHUNK_CHARS // 2
        if not ends:  # keep what follows the last space, or else the last whole character, for the next chunk
            end = data.rfind(b" ", 1)
            if end < CHUNK_CHARS // 2:
                end = len(data)
                while end > len(data) - 3 and data[end - 1] & 0xC0 == 0x80:
                    end -= 1
                end -= data[end - 1] >= 0xC0
            data, rest = data[:end], data[end:]
        text = decode(data, counts)
        yield start, (text[:-2] + "\n" if text.endswith("\r\n") else text), ends
    if rest:
        yield offset - len(rest), decode(rest, counts), True


def opened(path: Path, raw: Any) -> BinaryIO:
    """Opens the text of a file, which is compressed if its name ends in .gz or .zst.

    Text in UTF-16 or UTF-32, by its byte-order mark, is read as UTF-8. Where it is damaged, reading raises
    UnicodeError.
    """
    file = raw
    if path.suffix in (".gz", ".zst"):
        file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else _reader(_zstd_blocks(raw))
    head = file.peek(4)
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = "utf-32"
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        return file
    text = codecs.iterdecode(iter(lambda: file.read(CHUNK_CHARS), b""), encoding)
    return _reader(part.encode() for part in text)  # type: ignore[return-value]


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
