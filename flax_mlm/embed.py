"""Computes vectors of texts.

python -m flax_mlm.embed --checkpoint=runs/search --input=texts.txt --output=vectors.npy
python -m flax_mlm.embed --checkpoint=runs/search --input=corpus.jsonl --output=vectors.parquet --dimensions=64

Texts are the lines of a .txt file, or column `text` (or --text) of a .tsv, .csv or .jsonl file; a blank line is an
empty text, so that vectors and lines have the same numbers. Vectors are pooled by `finetune.pooling` and scaled to
length 1.
"""

import json
import sys
from typing import Any

from absl import flags

from flax_mlm.cli import app
from flax_mlm.config.schema import Config
from flax_mlm.errors import UserError, as_user_error
from flax_mlm.storage import files, gcs

_INPUT = flags.DEFINE_string("input", "", "file of texts: .txt (one a line), .tsv, .csv, .jsonl")
_TEXT = flags.DEFINE_string("text", "text", "column of the text")
_OUTPUT = flags.DEFINE_string("output", "", "vectors: .npy (float32, N × D), or .parquet (input's columns, `vector`)")
_DIMENSIONS = flags.DEFINE_integer("dimensions", 0, "number of first dimensions to keep, at length 1; 0: all", 0)


def main(config: Config) -> None:
    output = gcs.local("--output", _OUTPUT.value)
    if output.suffix not in (".npy", ".parquet"):
        raise UserError(f"--output is '{_OUTPUT.value}'; expected a name that ends in .npy or .parquet")
    files.check_writable("--output", output)
    source = app.required("input", "name a file of texts")
    if _DIMENSIONS.value > (size := config.model.hidden_size):
        raise UserError(f"--dimensions is {_DIMENSIONS.value}; the vectors of this encoder have {size}")

    import numpy as np
    from rich.progress import Progress

    from flax_mlm.data import tables
    from flax_mlm.inference import embeddings
    from flax_mlm.inference.load import load_model

    records, column = tables.records(source, blank_lines=True), _TEXT.value
    for location, record in records:
        if record and column not in record:
            raise UserError(f"{location} has no column {column}; it has {', '.join(map(str, record))}")
        if record and not isinstance(record[column], str):
            raise UserError(f"{location}: {column} is {json.dumps(record[column], default=str)[:60]}; expected text")
    model, texts = load_model(flags.FLAGS.checkpoint, config), [record.get(column, "") for _, record in records]
    with Progress(disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task("embedding", total=-(-len(texts) // config.finetune.batch_size))
        vectors_ND = embeddings.embed(model, texts, on_batch=lambda: progress.advance(bar))
    if _DIMENSIONS.value:
        vectors_ND = embeddings.normalize(vectors_ND[:, : _DIMENSIONS.value])
    unwritable = f"--output: '{output}' cannot be written: "
    with as_user_error(unwritable, OSError), files.replacing(output) as temporary, temporary.open("wb") as file:
        if output.suffix == ".npy":
            np.save(file, vectors_ND)
        else:
            _write_parquet(file, [record for _, record in records], vectors_ND)
    print(f"written to {output}: {vectors_ND.shape[0]:,} vectors of {vectors_ND.shape[1]}")


def _write_parquet(file: Any, records: list[dict[str, Any]], vectors_ND: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), vectors_ND.shape[1])
    with as_user_error(f"--input: '{_INPUT.value}' has columns that Parquet cannot store: ", pa.ArrowException):
        names = dict.fromkeys(name for record in records for name in record)  # pyarrow uses those of the first record
        columns = pa.table({name: [record.get(name) for record in records] for name in names})
        pq.write_table(columns.append_column("vector", column), file)


if __name__ == "__main__":
    app.run(main, from_checkpoint=True)
