"""Reading .zst files."""

import io
from typing import Any, BinaryIO


class ZstdReader(io.RawIOBase):
    """Decompresses a .zst file with any number of frames; unlike zstandard's own reader, an early end is an error."""

    def __init__(self, raw: BinaryIO):
        import zstandard  # only where such a file is read

        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._error = zstandard.ZstdError
        self._frame: Any = None  # decompressor of the frame that has begun and not ended
        self._data = b""
        self._rest = b""  # compressed bytes after the end of a frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._data:
            compressed = self._rest or self._raw.read(1 << 16)
            self._rest = b""
            if not compressed:
                if self._frame:
                    raise EOFError("it ends inside a compressed frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._data = self._frame.decompress(compressed)
            except self._error as e:
                raise OSError(str(e)) from e
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = None
        n = min(len(buffer), len(self._data))
        buffer[:n] = self._data[:n]
        self._data = self._data[n:]
        return n
