"""Every kind of source, written with the same documents: what `prepare` needs to make a corpus of it."""

import bz2
import csv
import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from tests.helpers import tokenizer_files
from tests.helpers.same_documents import documents

Changes = dict[str, Any]


def texts(count: int = 900) -> list[str]:
    """Documents without newlines, some of which are copies and near-duplicates of others far away."""
    originals = documents(count, one_line=True)
    copies = [text if i % 2 else f"{text} again" for i, text in enumerate(originals[:: count // 90])]
    return random.Random(0).sample([*originals, *copies, " ".join(originals[:200])], count + len(copies) + 1)


def _text(folder: Path) -> Changes:
    first, second = texts()[:700], texts()[700:]
    (folder / "a.txt").write_text("\n\n".join(first))
    (folder / "b.txt.gz").write_bytes(gzip.compress("\n\n".join(second).encode(), mtime=0))  # of several parts
    return {"data.source": f"text:{folder}/*"}


def _files(folder: Path) -> Changes:
    for number in range(0, len(texts()), 10):
        for copy in range(1 + (number % 100 == 0)):
            (folder / f"{copy}-{number:04d}.txt").write_text("\n\n".join(texts()[number : number + 10]))
    return {"data.source": f"text:{folder}/*#file"}


def _lines(folder: Path) -> Changes:
    (folder / "a.txt").write_text("\n".join(texts()))
    return {"data.source": f"lines:{folder}/*"}


def _jsonl(folder: Path) -> Changes:
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"a": {"b": text}}) for text in texts()))
    return {"data.source": f"jsonl:{folder}/*#a.b"}


def _json_list(folder: Path) -> Changes:
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in texts()], indent=1))
    return {"data.source": f"jsonl:{folder}/*"}


def _table(folder: Path, kind: str = "csv") -> Changes:
    with (folder / f"a.{kind}").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
        writer.writerows([["text", "id"], *([text, i] for i, text in enumerate(texts()))])
    return {"data.source": f"{kind}:{folder}/*#text"}


def _parquet(folder: Path) -> Changes:
    pq.write_table(pa.table({"text": texts()}), folder / "a.parquet", row_group_size=80)
    return {"data.source": f"parquet:{folder}/*"}


def _arrow(folder: Path) -> Changes:
    content = pa.table({"text": texts()})
    with pa.ipc.new_stream(folder / "a.arrow", content.schema) as writer:
        writer.write_table(content, max_chunksize=60)
    return {"data.source": f"arrow:{folder}/*"}


def _fasta(folder: Path) -> Changes:
    proteins = _proteins()
    (folder / "a.fasta").write_text("".join(f">p{i}\n{p[:60]}\n{p[60:]}\n" for i, p in enumerate(proteins)))
    return {"data.source": f"fasta:{folder}/*", "tokenizer.model_type": "symbols"}


def _symbols(folder: Path) -> Changes:
    (folder / "a.txt").write_text("\n".join(" ".join(p) for p in _proteins()))
    return {"data.source": f"symbols:{folder}/*", "tokenizer.model_type": "symbols"}


def _proteins() -> list[str]:
    rng = random.Random(0)
    found = ["".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=rng.randint(20, 200))) for _ in range(900)]
    return found + found[::9]


def _ids(folder: Path) -> Changes:
    made = tokenizer_files.vocabulary("byte_level", tokenizer_files.ROBERTA)
    tokenizer = tokenizer_files.folder(folder / "tokenizer", made)
    opened, end = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json")), made.token_to_id("</s>")
    ids = [i for encoding in opened.encode_batch(texts(), add_special_tokens=False) for i in (*encoding.ids, end)]
    np.array(ids, np.uint16).tofile(folder / "a.bin")
    (folder / "a.json").write_text(json.dumps({"dtype": "uint16", "document_end": end}))
    return {"data.source": f"ids:{folder}/*.bin", "tokenizer.path": str(tokenizer)}


def _wikiextractor(folder: Path) -> Changes:
    pages = (f'<doc id="{i}" url="u" title="{i}">\n{i}\n\n{text}\n\n</doc>\n' for i, text in enumerate(texts()))
    (folder / "wiki_00").write_text("".join(pages))
    lines = "".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts()[:400]))
    (folder / "wiki_01.bz2").write_bytes(bz2.compress(lines.encode()))
    return {"data.source": f"wikiextractor:{folder}/wiki*"}


def _tfds(folder: Path) -> Changes:
    tfds = pytest.importorskip("tensorflow_datasets")

    with tfds.core.registered.skip_registration():

        class Sentences(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = folder

            def _info(self):
                features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                yield from ((i, {"text": text}) for i, text in enumerate(texts()))

    config = tfds.download.DownloadConfig(try_download_gcs=False, register_checksums=False, num_shards=6)
    Sentences(data_dir=folder).download_and_prepare(download_config=config)
    return {"data.source": "tfds:sentences", "env": {"TFDS_DATA_DIR": str(folder)}}


def _hf(folder: Path) -> Changes:
    datasets = pytest.importorskip("datasets", reason="datasets is an optional package")
    datasets.Dataset.from_dict({"text": texts()}).save_to_disk(folder / "saved", num_shards=4)
    return {"data.source": f"hf:{folder}/saved"}


def _joined(folder: Path) -> Changes:
    (folder / "1").mkdir()
    (folder / "2").mkdir()
    return {"data.source": f"{_jsonl(folder / '1')['data.source']}|{_parquet(folder / '2')['data.source']}"}


def _s3(folder: Path) -> Changes:
    """Needs the stand-in for S3 at the addresses of this process' environment."""
    pytest.importorskip("s3fs")
    import fsspec

    fsspec.filesystem("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).pipe(
        {
            "bucket/text/a.txt": "\n\n".join(texts()[:600]).encode(),
            "bucket/text/b.txt.gz": gzip.compress("\n\n".join(texts()[600:]).encode(), mtime=0),
        }
    )
    return {"data.source": "text:s3://bucket/text/*"}


# Kind -> what writes it into an empty folder, and returns the changes of the config.
KINDS: dict[str, Callable[[Path], Changes]] = {
    "text": _text,
    "text#file": _files,
    "lines": _lines,
    "jsonl": _jsonl,
    "json list": _json_list,
    "csv": _table,
    "tsv": lambda folder: _table(folder, "tsv"),
    "parquet": _parquet,
    "arrow": _arrow,
    "fasta": _fasta,
    "symbols": _symbols,
    "ids": _ids,
    "wikiextractor": _wikiextractor,
    "tfds": _tfds,
    "hf": _hf,
    "joined": _joined,
    "s3": _s3,
}
