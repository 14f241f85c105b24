"""Documents that were made into token ids elsewhere: `.npy` files, and `.bin` files of uint16 or uint32.

Beside each file, NAME.json says which id ends a document: `{"document_end": 0}`, for `.bin` also `"dtype": "uint16"`.
"""

import dataclasses
import functools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from flax_mlm.data.sources import base
from flax_mlm.data.sources.base import Range, Source, Tokens
from flax_mlm.data.sources.files import File, find, from_files, naming
from flax_mlm.data.text import CHUNK_CHARS
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.errors import UserError

_CHUNK_IDS = CHUNK_CHARS // 4
_READ_IDS = 1 << 18  # at a time
_EXAMPLE = '{"dtype": "uint16", "document_end": 0}'


@dataclasses.dataclass(frozen=True)
class Ids:
    """A file of ids: where they begin, their type and number, and the id that ends a document."""

    file: File
    offset: int
    dtype: np.dtype[Any]
    count: int
    document_end: int

    def blocks(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """Reads ids from a position. Yields (position of the first one, ids) of at most `_READ_IDS`."""
        with self.file.reading() as raw:
            raw.seek(self.offset + start * self.dtype.itemsize)
            while start < self.count:
                size = min(_READ_IDS, self.count - start) * self.dtype.itemsize
                if len(data := raw.read(size)) < size:
                    raise EOFError(f"it has fewer than {self.count:,} ids")
                yield start, (ids := np.frombuffer(data, self.dtype))
                start += len(ids)


def open_ids(spec: str, pattern: str, tokenizer_path: str, extra_tokens_file: str) -> Source:
    """Opens files of ids, each with its side file. Raises UserError."""
    if not tokenizer_path:
        raise UserError(f"data.source is '{spec}'; expected tokenizer.path, the tokenizer that made the ids")
    tokenizer = tokenizer_path, extra_tokens_file
    found = [file for file in find(spec, pattern) if not file.path.endswith(".json")]
    described = {file.path: _described(file) for file in found}
    if not described:
        raise UserError(f"data.source is '{spec}', which has only .json files; expected .npy or .bin files beside them")
    files = [ids.file for ids in described.values()]
    return from_files(spec, files, lambda file: _ranges(described[file.path], tokenizer), None, ["ids"])


def _described(file: File) -> Ids:
    """Reads what the side file and the header say of a file; what the side file says is part of its version."""
    name, suffix = os.path.splitext(file.path)
    if suffix not in (".npy", ".bin"):
        raise UserError(f"{file.path} is no file of ids by its name; expected .npy, or .bin of uint16 or uint32")
    about = _side_file(file.path, f"{name}.json", suffix == ".bin")
    offset, size = 0, file.size
    if suffix == ".npy":
        with file.reading() as raw:
            dtype, count = _npy_header(file.path, raw)
            offset = raw.tell()
    else:
        dtype = np.dtype(about["dtype"]).newbyteorder("<")
        count = size // dtype.itemsize
    if size - offset != count * dtype.itemsize:
        what = f"{file.path} has {size - offset:,} bytes of ids"
        raise UserError(f"{what}; expected {count:,} of {dtype.itemsize} bytes each; check that the file is complete")
    version = [file.version, dtype.name, about["document_end"]]
    return Ids(dataclasses.replace(file, version=version), offset, dtype, count, about["document_end"])


def _side_file(path: str, side: str, needs_dtype: bool) -> dict[str, Any]:
    try:
        (file,) = find(side, side)
    except UserError as e:
        raise UserError(f"{path} has no side file {side}; write it, such as {_EXAMPLE}") from e
    with naming(side), file.reading() as raw:
        try:
            about = json.loads(raw.read())
        except ValueError:
            about = None
    is_right = isinstance(about, dict) and type(about.get("document_end")) is int and about["document_end"] >= 0
    if not is_right or (needs_dtype and about.get("dtype") not in ("uint16", "uint32")):
        raise UserError(f"{side} does not say what {path} holds; expected such as {_EXAMPLE}, with uint16 or uint32")
    return about


def _npy_header(path: str, raw: BinaryIO) -> tuple[np.dtype[Any], int]:
    """Reads the header of a .npy file: the type and the number of its ids."""
    try:
        version = np.lib.format.read_magic(raw)  # type: ignore[no-untyped-call]
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(raw)  # type: ignore[no-untyped-call]
    except ValueError as e:
        raise UserError(f"{path} is no .npy file: {e}") from e
    if len(shape) != 1 or dtype.kind not in "iu":
        raise UserError(f"{path} is an array of {dtype.name} and shape {shape}; expected one dimension of integers")
    return dtype, shape[0]


def _ranges(ids: Ids, tokenizer: tuple[str, str]) -> Iterator[Range]:
    """Divides a file into ranges of `UNIT_BYTES`; a document belongs to the range in which it begins."""
    size = ids.dtype.itemsize
    step = max(1, base.UNIT_BYTES // size)
    starts = list(range(0, ids.count, step)) or [0]
    for start in starts:
        is_last = start == starts[-1]
        end = sys.maxsize if is_last else start + step
        reader = functools.partial(_read, ids, tokenizer, start, end)
        number = min(end, ids.count) - start
        yield Range(ids.file.path, number * size, reader, start == 0, is_last)


@functools.lru_cache(4)
def _tokenizer(path: str, extra_tokens_file: str) -> Tokenizer:
    """Loads a tokenizer, once in each process that reads."""
    return load_tokenizer(path, extra_tokens_file)


def _read(
    ids: Ids, tokenizer: tuple[str, str], start: int, end: int, counts: Counter[str]
) -> Iterator[tuple[int, Tokens]]:
    before, size = counts["read"], ids.dtype.itemsize
    tok = _tokenizer(*tokenizer)
    for document, position, chunk, is_whole in _chunks(ids, start, end, tok.starts_word):
        _check(ids, position, chunk, tok)
        text = tok.decode(chunk[chunk != tok.unk_id])
        # As for text, a document without a token that stands for something is empty.
        if is_whole and not text.strip() and not (chunk == tok.unk_id).any():
            counts["empty_documents"] += 1
            continue
        counts["read"] = before + (min(position + len(chunk), end, ids.count) - start) * size
        yield document, Tokens(text, chunk.astype(np.uint32))


def _chunks(ids: Ids, start: int, end: int, starts_word: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, bool]]:
    """Reads the documents that begin in a range, cut where a word begins if there is one.

    Yields:
      (position where the document begins, that of the chunk, its ids, whether it is the whole document).
    """
    document: float = start if not start else math.inf  # unknown until an end is found
    rest, position = np.zeros(0, ids.dtype), start
    for offset, block in ids.blocks(max(start - 1, 0)):
        ends = np.flatnonzero(block == ids.document_end)
        begin = 0
        for stop in [*ends.tolist(), len(block)]:
            is_end = stop < len(block)
            if document < math.inf:
                rest = np.concatenate([rest, block[begin:stop]]) if len(rest) else block[begin:stop]
                while len(rest) > _CHUNK_IDS:
                    n = _cut(rest, starts_word)
                    yield int(document), position, rest[:n], False
                    rest, position = rest[n:], position + n
                if is_end:
                    yield int(document), position, rest, position == document
            if is_end:
                document = position = offset + stop + 1
                rest, begin = rest[:0], stop + 1
                if document >= end:
                    return
        if document == math.inf and offset + len(block) >= end:  # no document begins in the range
            return
    if document < ids.count:
        yield int(document), position, rest, position == document


def _cut(ids: np.ndarray, starts_word: np.ndarray) -> int:
    """Returns how many ids are a chunk: up to the last beginning of a word, or else `_CHUNK_IDS`."""
    last = ids[_CHUNK_IDS // 2 : _CHUNK_IDS + 1]
    found = np.flatnonzero(starts_word[np.minimum(last, len(starts_word) - 1).astype(np.int64)])
    return _CHUNK_IDS // 2 + int(found[-1]) if len(found) else _CHUNK_IDS


def _check(ids: Ids, position: int, chunk: np.ndarray, tokenizer: Tokenizer) -> None:
    """Raises UserError for an id that cannot be part of a text."""
    is_outside = (chunk < 0) | (chunk >= tokenizer.vocab_size)
    is_marker = tokenizer.is_special[np.where(is_outside, 0, chunk).astype(np.int64)] & ~is_outside
    if tokenizer.unk_id != tokenizer.mask_id:
        is_marker &= chunk != tokenizer.unk_id  # it stands for text
    if not (bad := np.flatnonzero(is_outside | is_marker)).size:
        return
    where, value = f"{ids.file.path}: position {position + bad[0]:,}", int(chunk[bad[0]])
    if is_outside[bad[0]]:
        raise UserError(f"{where} holds id {value}; expected ids below {tokenizer.vocab_size}, as of tokenizer.path")
    remedy = "leave it out, as [CLS] and [SEP] are added"
    if value == tokenizer.sep_id:
        remedy += f'; or, if it ends documents, write "document_end": {value} in the side file'
    raise UserError(f"{where} holds id {value}, the special token {tokenizer.tokens[value]}; {remedy}")
