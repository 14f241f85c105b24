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

_UNSTORABLE = "--input: '%s' has columns that Parquet cannot store"


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
    table = _table([record for _, record in records]) if output.suffix == ".parquet" else None
    model, texts = load_model(flags.FLAGS.checkpoint, config), [record.get(column, "") for _, record in records]
    with Progress(disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task("embedding", total=-(-len(texts) // config.finetune.batch_size))
        vectors_ND = embeddings.embed(model, texts, on_batch=lambda: progress.advance(bar))
    if _DIMENSIONS.value:
        vectors_ND = embeddings.normalize(vectors_ND[:, : _DIMENSIONS.value])
    unwritable = f"--output: '{output}' cannot be written: "
    with as_user_error(unwritable, OSError), files.replacing(output) as temporary, temporary.open("wb") as file:
        if table is None:
            np.save(file, vectors_ND)
        else:
            _write_parquet(file, table, vectors_ND)
    print(f"written to {output}: {vectors_ND.shape[0]:,} vectors of {vectors_ND.shape[1]}")


def _table(records: list[dict[str, Any]]) -> Any:
    """Builds the Parquet table of the input's columns. Raises UserError: Parquet cannot store one."""
    import pyarrow as pa

    names = dict.fromkeys(name for record in records for name in record)  # pyarrow uses those of the first record
    if "vector" in names:
        raise UserError(f"--input: '{_INPUT.value}' has a column vector, the name of the column to add; rename it")
    with as_user_error(f"{_UNSTORABLE % _INPUT.value}: ", pa.ArrowException, OverflowError):
        return pa.table({name: [record.get(name) for record in records] for name in names})


def _write_parquet(file: Any, table: Any, vectors_ND: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), vectors_ND.shape[1])
    with as_user_error(f"{_UNSTORABLE % _INPUT.value}: ", pa.ArrowException):
        pq.write_table(table.append_column("vector", column), file)


if __name__ == "__main__":
    app.run(main, from_checkpoint=True, prints_log=True)
