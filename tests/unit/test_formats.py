"""The same documents in every format are the same corpus, and what is no text is counted or named."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.helpers.same_documents import corpus_of, documents, expected_corpus, read_documents

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def table(texts) -> pa.Table:
    nested = [{"body": text, "number": i} for i, text in enumerate(texts)]
    return pa.table({"id": list(range(len(texts))), "text": list(texts), "a.b": list(texts), "nested": nested})


def parquet(texts, file: Path, **options) -> None:
    pq.write_table(table(texts), file, **({"row_group_size": 700} | options))


def arrow_stream(texts, file: Path, **options) -> None:
    content = table(texts)
    with pa.ipc.new_stream(file, content.schema, **options) as writer:
        writer.write_table(content, max_chunksize=300)


def arrow_file(texts, file: Path, **options) -> None:
    content = table(texts)
    with pa.ipc.new_file(file, content.schema, **options) as writer:
        writer.write_table(content, max_chunksize=300)


def separated(texts, delimiter: str = ",", **options) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, **options)
    writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    return buffer.getvalue().encode()


def json_lines(texts, **options) -> bytes:
    return "\n".join(json.dumps({"id": 1, "text": t, "nested": {"body": t}}, **options) for t in texts).encode()


def json_list(texts, **options) -> bytes:
    return json.dumps([{"id": 1, "text": text} for text in texts], **options).encode()


def pretty(texts) -> bytes:
    return "\n".join(json.dumps({"id": 1, "text": text}, indent=2) for text in texts).encode()


def as_bytes(write: Callable, *args, **options) -> Callable:
    return lambda texts, file: file.write_bytes(write(texts, *args, **options))


def packed(write: Callable, suffix: str) -> Callable:
    return lambda texts, file: file.write_bytes(PACK[suffix](write(texts)))


# Source, with FILE for the name -> what writes it.
FORMATS = {
    "parquet:FILE.parquet": parquet,
    "parquet:FILE.zst.parquet#nested.body": lambda t, f: parquet(t, f, compression="zstd"),
    "parquet:FILE.literal.parquet#a.b": parquet,
    "arrow:FILE.arrow": arrow_stream,
    "arrow:FILE.file.arrow#nested.body": arrow_file,
    "arrow:FILE.feather": lambda t, f: arrow_file(t, f, options=pa.ipc.IpcWriteOptions(compression="lz4")),
    "csv:FILE.csv": as_bytes(separated),
    "csv:FILE.unix.csv#{text}": as_bytes(separated, lineterminator="\n", quoting=csv.QUOTE_ALL),
    "tsv:FILE.tsv#text": as_bytes(separated, "\t"),
    "jsonl:FILE.jsonl": as_bytes(json_lines),
    "jsonl:FILE.raw.jsonl#nested.body": as_bytes(json_lines, ensure_ascii=False),
    "jsonl:FILE.list.json": as_bytes(json_list),
    "jsonl:FILE.indented.json": as_bytes(json_list, indent=1),
    "jsonl:FILE.pretty.json": as_bytes(pretty),
    "text:FILE.txt": as_bytes(lambda texts: "\n\n".join(texts).encode()),
    **{f"csv:FILE.csv{suffix}#text": packed(separated, suffix) for suffix in PACK},
    **{f"jsonl:FILE.jsonl{suffix}": packed(json_lines, suffix) for suffix in PACK},
    **{f"jsonl:FILE.list.json{suffix}": packed(json_list, suffix) for suffix in PACK},
}


def written(source: str, folder: Path, texts) -> str:
    """Writes documents in the format of a source, and returns the source."""
    name = source.partition(":")[2].partition("#")[0]
    FORMATS[source](texts, folder / name.replace("FILE", "file"))
    return source.replace("FILE", f"{folder}/file")


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, str]:
    return expected_corpus(tmp_path_factory.mktemp("expected"))


@pytest.mark.parametrize("source", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path, source):
    assert read_documents(written(source, tmp_path, documents())) == list(documents())


@pytest.mark.parametrize("source", FORMATS)
def test_every_format_gives_the_same_corpus(tmp_path, source, expected):
    assert corpus_of(written(source, tmp_path, documents()), tmp_path / "out") == expected
