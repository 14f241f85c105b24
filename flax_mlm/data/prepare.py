"""Making a corpus: documents -> tokenizer -> packed rows on disk or in a bucket.

Killed at any moment and started again, `prepare` continues, and ends with the same bytes, which do not depend on what
makes the units either: the processes of this machine, an engine (see `engines`), or machines that each make one shard
of them (`prepare_shard`, `merge`). Unfinished work is kept in OUTPUT.tmp, which is removed at the end.
"""

import functools
import os
import re
import time
from pathlib import Path
from typing import Any

from etils import epath

from flax_mlm.config.schema import Config
from flax_mlm.data import symbol_training, tokenizer_training
from flax_mlm.data.cleaning.clean import Cleaning, log_report
from flax_mlm.data.corpus import FORMAT, Corpus, row_dtype
from flax_mlm.data.engines import local
from flax_mlm.data.engines.worker import MakeUnit, RecordUnit, Run, Task
from flax_mlm.data.held_out import check_fraction
from flax_mlm.data.preparation_log import log_lost_text, log_summary, progress
from flax_mlm.data.sources.base import Source, Unit
from flax_mlm.data.sources.open import Options, open_source
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.data.units import join
from flax_mlm.data.work import Log, Work, is_done, locked, working
from flax_mlm.errors import UserError
from flax_mlm.storage import buckets, files
from flax_mlm.storage.gcs import AnyPath


def source_of(config: Config) -> Source:
    """Opens `data.source`. Raises UserError."""
    t = config.tokenizer
    return open_source(config.data.source, Options(config.data.encoding, t.path, t.extra_tokens_file))


def prepare(config: Config, output: str | Path | None = None, log: Log = print, run: Run | None = None) -> Corpus:
    """Makes the corpus that a config describes, or opens it where it is made already.

    It starts processes that import the main module, so a script that calls it needs `if __name__ == "__main__":`.

    Args:
      output: folder of the corpus, also in a bucket; None: one in `data.cache_dir`, named after the source and a hash
        of the settings.
      log: called with each line about the progress.
      run: works on the units elsewhere; None: `data.num_workers` processes of this machine do.

    Raises:
      UserError: the source cannot be read, or `output` holds something else or cannot be written.
    """
    source, cleaning = source_of(config), Cleaning.from_config(config.data)
    request = _request(config, source, cleaning)
    if output is None:
        name = re.sub(r"[^A-Za-z0-9]+", "-", config.data.source).strip("-")[:40]
        output = Path(config.data.cache_dir) / f"{name}-{request[:16]}"
    output = _parse(output)
    with working(output, request, log, is_alone=True) as work:
        if work:
            run = run or functools.partial(local.run, num_workers=config.data.num_workers)
            _check(source, log)
            if cleaning:
                work.claim()
                _run(RecordUnit(work, cleaning), source.units, run, log)
            cleaned = cleaning.apply(source, work, log) if cleaning else source
            _prepare_tokenizer(config, cleaned, work, log)
            _run(MakeUnit(work, config.data), cleaned.units, run, log)
            _finish(config, source, cleaning, request, output, work, log)
    return Corpus.open(os.fspath(output))


def prepare_shard(config: Config, output: str | Path, shard: int, num_shards: int, log: Log = print) -> None:
    """Makes the units of one shard of a corpus, and leaves them in OUTPUT.tmp, which all machines share.

    Where documents are compared with those of other shards, the signatures of all shards have to be there first: then
    those that come before the last one do no more than write theirs, and have to be run again.

    Args:
      shard: 1 to `num_shards`.

    Raises:
      UserError: as `prepare`.
    """
    source, cleaning = source_of(config), Cleaning.from_config(config.data)
    run = functools.partial(local.run, num_workers=config.data.num_workers)
    with working(_parse(output), _request(config, source, cleaning), log, is_alone=False) as work:
        if not work:
            return
        work.begin_shard(shard, num_shards)
        _check(source, log)
        if cleaning:
            work.claim()
            _run(RecordUnit(work, cleaning), source.units[shard - 1 :: num_shards], run, log)
            if cleaning.unrecorded(source.units, work):
                log(f"shard {shard} of {num_shards} has written its signatures; after all of them, run each again")
                return
        with locked(work.folder / "tokenizer.lock", log):
            cleaned = cleaning.apply(source, work, log) if cleaning else source
            _prepare_tokenizer(config, cleaned, work, log)
        _run(MakeUnit(work, config.data), cleaned.units[shard - 1 :: num_shards], run, log)
        log(f"shard {shard} of {num_shards} is done; after all of them, run it with --merge in place of --shard")


def merge(config: Config, output: str | Path, log: Log = print) -> Corpus:
    """Makes a corpus of the units that `prepare_shard` has left.

    Raises:
      UserError: also where units are missing.
    """
    source, cleaning = source_of(config), Cleaning.from_config(config.data)
    request = _request(config, source, cleaning)
    output = _parse(output)
    with working(output, request, log, is_alone=True) as work:
        if work:
            _finish(config, source, cleaning, request, output, work, log)
    return Corpus.open(os.fspath(output))


def _parse(output: str | Path) -> AnyPath:
    """Parses the folder of the corpus. Raises UserError."""
    url = buckets.parse("--output", os.fspath(output))
    if url and not os.fspath(url).partition("://")[2].partition("/")[2]:
        raise UserError(f"--output: '{output}' is a whole bucket; name a folder in it")
    return epath.Path(os.fspath(url).rstrip("/")) if url else Path(output).expanduser().absolute()


def _request(config: Config, source: Source, cleaning: Cleaning | None) -> str:
    """Hashes all that decides the bytes of the corpus."""
    d, t = config.data, config.tokenizer
    cleaned = cleaning.version if cleaning else None
    tokenizer: Any = [t.model_type, t.vocab_size, t.normalization, t.character_coverage, t.sample_bytes]
    if t.path:
        tokenizer = load_tokenizer(t.path, t.extra_tokens_file).fingerprint
    return files.digest([FORMAT, source.version, cleaned, tokenizer, d.seq_len, d.packing, d.validation_fraction])


def _check(source: Source, log: Log) -> None:
    log(f"source: {source.name}; licence: {source.licence}")
    source.check()


def _prepare_tokenizer(config: Config, source: Source, work: Work, log: Log) -> None:
    """Makes the tokenizer, after it has checked that there are documents to train on and to hold out."""
    check_fraction(source, config.data.validation_fraction)
    tokenizer = _tokenizer(config, source, work, log)
    if config.objective.name != "clm":
        tokenizer.require_words(config.objective.masking)


def _run(task: Task, units: tuple[Unit, ...], run: Run, log: Log) -> None:
    """Works on the units that are not finished yet."""
    todo = task.undone(units)
    if finished := len(units) - len(todo):
        log(f"{task.title}: {finished} units were finished before and are reused")
    if todo:
        run(task, todo, log)


def _finish(
    config: Config,
    source: Source,
    cleaning: Cleaning | None,
    request: str,
    output: AnyPath,
    work: Work,
    log: Log,
) -> None:
    """Joins the units, and writes the corpus, corpus.json last. Raises UserError: units are missing."""
    if buckets.is_one(output) and is_done(output, request, has_work=True):
        return  # another process has finished it, and perhaps deleted the records
    if missing := work.unfinished(source.units):
        raise UserError(_missing([unit.number for unit in missing], len(source.units), output, work))
    tokenizer, totals, data = load_tokenizer(work.tokenizer), join(work, len(source.units)), config.data
    for name, split in totals.splits.items():
        if not split["rows"]:
            raise UserError(f"data.source is '{data.source}'; its {name} documents hold no text")
    about = {"file": tokenizer.filename, "size": len(tokenizer.content), "sha256": tokenizer.fingerprint}
    manifest = {
        "format": FORMAT,
        "request": request,
        "source": {"name": source.name, "licence": source.licence, "counts": dict(sorted(totals.counts.items()))},
        "tokenizer": about | {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id},
        "seq_len": data.seq_len,
        "packing": data.packing,
        "validation_fraction": data.validation_fraction,
        "dtype": row_dtype(tokenizer.vocab_size).name,
        "splits": totals.splits,
    }
    if cleaning:
        report = cleaning.report(source, work, totals.tokens_per_byte)
        cleaning.keep(report, work)
    work.publish(output, tokenizer, manifest)
    log_summary(manifest, log)
    if cleaning:
        log_report(report, log)
    log_lost_text(totals, tokenizer.tokens[tokenizer.unk_id], log)
    log(f"corpus: {output}")


def _missing(missing: list[int], num_units: int, output: AnyPath, work: Work) -> str:
    """Says which units are not made, and which shards have them."""
    few = _few(missing)
    what = f"{output}: {len(missing):,} of {num_units:,} units are not made ({few})"
    if not (num_shards := work.num_shards()):
        return f"{what}; run all shards (--shard=K/N), or the engine again, with the same settings first"
    shards = sorted({unit % num_shards for unit in missing})
    names = _few([f"--shard={shard + 1}/{num_shards}" for shard in shards])
    return f"{what}; run {names} with the same settings first"


def _few(items: list[Any]) -> str:
    return ", ".join(map(str, items[:5])) + ", ..." * (len(items) > 5)


def _tokenizer(config: Config, source: Source, work: Work, log: Log) -> Tokenizer:
    """Returns the given tokenizer, or trains one, and keeps it."""
    t = config.tokenizer
    if files.exists(work.tokenizer):
        log("tokenizer: made before, used again")
        return load_tokenizer(work.tokenizer)
    if t.path:
        log(f"tokenizer: {t.path}{f' with the words of {t.extra_tokens_file}' * bool(t.extra_tokens_file)}")
        tokenizer = load_tokenizer(t.path, t.extra_tokens_file)
    elif t.model_type == "symbols":
        with progress("counting symbols", source.size, log) as show:
            symbols = symbol_training.count_symbols(source, config.data.validation_fraction, show)
        tokenizer = symbol_training.make_tokenizer(symbols, t.vocab_size, log)
    else:
        with progress("sampling text", source.size, log) as show:
            sample = tokenizer_training.sample(source, config.data.validation_fraction, t.sample_bytes, show)
        size = sum(len(text.encode()) for text in sample)
        log(f"tokenizer: training {t.model_type}, vocabulary {t.vocab_size:,}, on {size:,} bytes")
        start = time.monotonic()
        tokenizer = tokenizer_training.train_tokenizer(sample, t)
        log(f"tokenizer: trained in {time.monotonic() - start:.1f} s")
    work.keep_tokenizer(tokenizer)
    return tokenizer
