"""What one processor core feeds: text prepared a second, and tokens read from prepared rows.

    python -m benchmarks.input --config=small --config.data.seq_len=512 \
        --config.data.source='text:wiki.txt.gz' --json=input.json > input.md

Everything here runs on one core, TensorFlow's threads and child processes included (they are bound to it), so that a
rate is one per core; Linux only. The first batch of a late step is asked for as well: resuming is arithmetic.
"""

import collections
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import turns  # first, for the environment as it was
from flax_mlm.cli import app, tables
from flax_mlm.config.schema import Config
from flax_mlm.storage import files

_ROUNDS = flags.DEFINE_integer("rounds", 5, "of each kind", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 256, "rows of a batch", lower_bound=1)
_BATCHES = flags.DEFINE_integer("batches", 100, "read in a round", lower_bound=1)
_LATE = flags.DEFINE_integer("late", 10**7, "the step whose first batch is compared with that of step 0")
_JSON = flags.DEFINE_string("json", "", "file for all that was measured")


def whole_command(config: Config, output: Path) -> float:
    """Seconds of `python -m flax_mlm.prepare`, from its start to its end."""
    d, t = config.data, config.tokenizer
    line = [sys.executable, "-m", "flax_mlm.prepare", f"--output={output}", f"--config.data.source={d.source}"]
    line += [f"--config.data.seq_len={d.seq_len}", f"--config.model.max_positions={max(512, d.seq_len)}"]
    line += ["--config.data.num_workers=1", f"--config.tokenizer.vocab_size={t.vocab_size}"]
    start = time.perf_counter()
    subprocess.run(line, cwd=turns.ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def phases(config: Config, folder: Path) -> tuple[dict[str, float], int]:
    """Seconds of what `prepare` does, one after another, by the same functions; and the bytes of text."""
    from flax_mlm.data.corpus import row_dtype
    from flax_mlm.data.sources.open import open_source
    from flax_mlm.data.tokenising import make_jobs
    from flax_mlm.data.tokenizer import load_tokenizer
    from flax_mlm.data.tokenizer_training import thinned, train_tokenizer
    from flax_mlm.data.units import write_shard

    times, seconds = [time.perf_counter()], {}

    def done(what: str) -> None:
        times.append(time.perf_counter())
        seconds[what] = times[-1] - times[-2]

    chunks = list(open_source(config.data.source).chunks(collections.Counter()))
    done("reading text")
    sample = thinned((chunk.text for chunk in chunks), config.tokenizer.sample_bytes)
    train_tokenizer(sample, config.tokenizer).save(folder)
    done("training the tokenizer")
    tokenizer = load_tokenizer(folder)
    tokenizer.num_threads = 1
    encoded = [ids for job in make_jobs(chunks) for ids in tokenizer.encode([chunk.text for chunk in job])]
    done("tokenising")
    texts = [chunk.text for chunk in chunks]
    sizes = [[len(ids), len(t.split()), len(t.encode())] for t, ids in zip(texts, encoded, strict=True)]
    documents = np.unique([chunk[:2] for chunk in chunks], axis=0, return_inverse=True)[1]
    table = np.column_stack([documents, sizes])
    ids = np.concatenate(encoded).astype(row_dtype(tokenizer.vocab_size))
    write_shard(folder / "train-00000.npy", ids, table, config.data.seq_len, tokenizer, config.data.packing)
    done("packing and writing")
    return seconds, sum(len(text.encode()) for text in texts)


def readers(corpus: Any) -> dict[str, Callable[[], float]]:
    """Tokens a second, padding included, of ways to read the prepared rows."""
    from flax_mlm.data.corpus import Rows
    from flax_mlm.data.pipeline import train_batches
    from flax_mlm.data.stream import Stream

    rows, size, count = corpus.split("train"), _ROWS.value, _BATCHES.value
    one, two = Stream((rows.num_rows,)), Stream((rows.num_rows, rows.num_rows), (7, 3))
    rng = np.random.default_rng(0)

    def direct() -> float:
        order = [rng.integers(0, rows.num_rows, size) for _ in range(count)]
        start = time.perf_counter()
        for index in order:
            rows.read(index)
        return count * size * rows.seq_len / (time.perf_counter() - start)

    def pipeline(rows: Any, stream: Stream) -> float:
        batches = train_batches(rows, seed=0, global_batch_size=size, start_step=0, stop_step=1 << 40, stream=stream)
        next(batches)
        start = time.perf_counter()
        for _ in range(count):
            next(batches)
        seconds = time.perf_counter() - start
        batches.close()
        return count * size * rows.seq_len / seconds

    return {
        "rows by number, checksums compared": direct,
        "batches of the training stream": lambda: pipeline(rows, one),
        "batches of two corpora, 7:3 (twice this one)": lambda: pipeline(Rows.joined([rows, rows]), two),
    }


def first_batch(corpus: Any, step: int) -> float:
    """Seconds until the first batch from a step on."""
    from flax_mlm.data.pipeline import train_batches

    start = time.perf_counter()
    rows, stop = corpus.split("train"), step + 1000
    batches = train_batches(rows, seed=0, global_batch_size=_ROWS.value, start_step=step, stop_step=stop)
    next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    return seconds


def main(config: Config) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from flax_mlm.data.corpus import Corpus

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = whole_command(config, folder / "corpus")
        (folder / "phases").mkdir()
        by_phase, size = phases(config, folder / "phases")
        corpus = Corpus.open(folder / "corpus")
        kinds = readers(corpus)
        for step in (0, 0, _LATE.value):
            first_batch(corpus, step)  # the first one imports TensorFlow
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        firsts: dict[int, list[float]] = {0: [], _LATE.value: []}
        for _ in range(_ROUNDS.value):
            for kind, read in kinds.items():
                rates[kind].append(read())
            for step in firsts:
                firsts[step].append(first_batch(corpus, step))

    megabytes, rows = size / 1e6, [["the whole command", whole], *by_phase.items()]
    print(tables.markdown(("prepare", "s", "MB/s"), [[k, f"{s:.1f}", f"{megabytes / s:.2f}"] for k, s in rows]))
    print(f"\n{megabytes:.1f} MB of text, {corpus.about['name']}, vocabulary {corpus.vocab_size:,}\n")
    header = (f"batches of {_ROWS.value} × {corpus.seq_len}", "million tokens/s")
    print(tables.markdown(header, [[kind, f"{statistics.median(r) / 1e6:.1f}"] for kind, r in rates.items()]) + "\n")
    table = [[f"{step:,}", f"{1e3 * statistics.median(s):.0f}"] for step, s in firsts.items()]
    print(tables.markdown(("first batch from step", "ms"), table))
    print(f"\nAll on one core of: {turns.machine()}.")
    if _JSON.value:
        record = {"machine": turns.machine(), "bytes": size, "whole": whole, "phases": by_phase}
        files.write_json(Path(_JSON.value), record | {"tokens_per_second": rates, "first_batch": firsts})


if __name__ == "__main__":
    app.run(main)
