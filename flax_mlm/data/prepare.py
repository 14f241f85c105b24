"""Making a corpus: documents -> tokenizer -> packed rows on disk.

Killed at any moment and started again, `prepare` continues, and ends with the same bytes, which do not depend on the
number of workers either. Unfinished work is kept in OUTPUT.tmp, which is removed at the end. Several machines that
share a file system may each make the units of one shard (`prepare_shard`), which `merge` joins.
"""

import contextlib
import fcntl
import functools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flax_mlm.config.schema import Config
from flax_mlm.data import tokenizer_training
from flax_mlm.data.corpus import FORMAT, MANIFEST, Corpus, row_dtype, write_manifest
from flax_mlm.data.held_out import check_fraction
from flax_mlm.data.preparation_log import log_lost_text, log_summary, progress
from flax_mlm.data.sources.base import Source, Unit
from flax_mlm.data.sources.open import Options, open_source
from flax_mlm.data.tokenising import tokenise_in_processes
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.data.units import Work, join, make_units
from flax_mlm.errors import UserError
from flax_mlm.storage import files

Log = Callable[[str], None]


def source_of(config: Config) -> Source:
    """Opens `data.source`. Raises UserError."""
    return open_source(config.data.source, Options(config.data.encoding))


def prepare(config: Config, output: str | Path | None = None, log: Log = print) -> Corpus:
    """Makes the corpus that a config describes, or opens it where it is made already.

    It starts processes that import the main module, so a script that calls it needs `if __name__ == "__main__":`.

    Args:
      output: folder of the corpus; None: one in `data.cache_dir`, named after the source and a hash of the settings.
      log: called with each line about the progress.

    Raises:
      UserError: the source cannot be read, or `output` holds something else or cannot be written.
    """
    source = source_of(config)
    request = _request(config, source)
    if output is None:
        name = re.sub(r"[^A-Za-z0-9]+", "-", config.data.source).strip("-")[:40]
        output = Path(config.data.cache_dir) / f"{name}-{request[:16]}"
    output = _local(output)
    with _working(output, request, log, is_alone=True) as work:
        if work:
            _begin(config, source, work, log)
            _make(config, source.units, work, log)
            _finish(config, source, request, output, work, log)
    return Corpus.open(output)


def prepare_shard(config: Config, output: str | Path, shard: int, num_shards: int, log: Log = print) -> None:
    """Makes the units of one shard of a corpus, and leaves them in OUTPUT.tmp, which all machines share.

    Args:
      shard: 1 to `num_shards`.

    Raises:
      UserError: as `prepare`.
    """
    source = source_of(config)
    request = _request(config, source)
    with _working(_local(output), request, log, is_alone=False) as work:
        if work:
            with _lock(work.folder / "tokenizer.lock", log):
                _begin(config, source, work, log)
            _make(config, source.units[shard - 1 :: num_shards], work, log)
            log(f"shard {shard} of {num_shards} is done; after all of them, run it with --merge in place of --shard")


def merge(config: Config, output: str | Path, log: Log = print) -> Corpus:
    """Makes a corpus of the units that `prepare_shard` has left.

    Raises:
      UserError: also where units are missing.
    """
    source = source_of(config)
    request = _request(config, source)
    output = _local(output)
    with _working(output, request, log, is_alone=True) as work:
        if work:
            missing = [unit.number for unit in source.units if not work.finished(unit.number)]
            if missing:
                few = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
                what = f"{len(missing):,} of {len(source.units):,} units are not made ({few})"
                raise UserError(f"{output}: {what}; run all shards (--shard=K/N) with the same settings first")
            _finish(config, source, request, output, work, log)
    return Corpus.open(output)


def _local(output: str | Path) -> Path:
    if "://" in str(output):
        raise UserError(f"the output is {output}; expected a local folder, which you can copy there")
    return Path(output).expanduser().absolute()


@contextlib.contextmanager
def _working(output: Path, request: str, log: Log, is_alone: bool) -> Iterator[Work | None]:
    """Makes the folder of unfinished work, and removes it where nothing in it is worth keeping.

    Args:
      is_alone: others must not work there; otherwise they may, if they are not alone either.

    Yields:
      None where the corpus is there already.
    """
    folder = output.with_name(output.name + ".tmp")
    try:
        if _is_done(output, request) and not folder.exists():
            log(f"corpus: {output}, already prepared")
            yield None
            return
        with _claimed(folder, log, is_alone):
            try:
                # another process may have made it during the wait for the lock
                work = folder / request[:16]
                is_done = _is_done(output, request)
                if not is_done:
                    work.mkdir(exist_ok=True)
                yield None if is_done else Work(work, work / "corpus")
            except UserError:
                if is_alone and not any(folder.glob("*/units/*.json")):  # only finished units are worth keeping
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            if is_alone:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as e:
        raise UserError(f"cannot write {output}: {e.strerror or e}; fix this and rerun; finished work is reused") from e


def _request(config: Config, source: Source) -> str:
    """Hashes all that decides the bytes of the corpus."""
    d, t = config.data, config.tokenizer
    tokenizer: Any = [t.model_type, t.vocab_size, t.normalization, t.character_coverage, t.sample_bytes]
    if t.path:
        tokenizer = load_tokenizer(t.path, t.extra_tokens_file).fingerprint
    return files.digest([FORMAT, source.version, tokenizer, d.seq_len, d.packing, d.validation_fraction])


def _is_done(output: Path, request: str) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / MANIFEST).exists():
        raise UserError(f"the output, {output}, exists and is not a corpus; name another folder")
    if Corpus.open(output).manifest["request"] != request:
        raise UserError(f"{output} holds a corpus of other text or settings; name another folder, or delete that one")
    return True


@contextlib.contextmanager
def _claimed(folder: Path, log: Log, is_alone: bool) -> Iterator[None]:
    """Makes the folder of unfinished work, and locks out other processes until the block ends."""
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if not re.fullmatch("lock|[0-9a-f]{16}", path.name):
                raise UserError(f"{path} is not ours, and its folder is for unfinished work; move it away")
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        # The last owner of the lock may have finished, and be removing the folder.
        with contextlib.suppress(FileNotFoundError), _lock(folder / "lock", log, is_alone) as file:
            if os.path.samestat(os.fstat(file.fileno()), (folder / "lock").stat()):
                yield
                return


@contextlib.contextmanager
def _lock(path: Path, log: Log, is_alone: bool = True) -> Iterator[Any]:
    """Locks a file, alone or with others that are not alone either."""
    with path.open("w") as file:
        kind = fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"another process is at work in {path.parent}; waiting for it")
            fcntl.flock(file, kind)
        yield file


def _begin(config: Config, source: Source, work: Work, log: Log) -> None:
    """Checks a source, and makes the tokenizer."""
    log(f"source: {source.name}; licence: {source.licence}")
    source.check()
    check_fraction(source, config.data.validation_fraction)
    tokenizer = _tokenizer(config, source, work.tokenizer, log)
    if config.objective.name != "clm":
        tokenizer.require_words(config.objective.masking)


def _make(config: Config, units: Iterable[Unit], work: Work, log: Log) -> None:
    """Makes the units that are not finished yet."""
    units = list(units)
    todo = [unit for unit in units if not work.finished(unit.number)]
    if finished := len(units) - len(todo):
        log(f"tokenising: {finished} units were finished before and are reused")
    num_workers = config.data.num_workers or os.cpu_count() or 1
    tokenise = functools.partial(tokenise_in_processes, tokenizer_path=work.tokenizer, num_workers=num_workers)
    with progress("tokenising", sum(unit.size for unit in todo), log) as show:
        make_units(todo, work, load_tokenizer(work.tokenizer), config.data, tokenise, show)


def _finish(config: Config, source: Source, request: str, output: Path, work: Work, log: Log) -> None:
    """Joins the units, writes corpus.json, and renames the folder to `output`."""
    tokenizer, totals, data = load_tokenizer(work.tokenizer), join(work, len(source.units)), config.data
    for name, split in totals.splits.items():
        if not split["rows"]:
            raise UserError(f"data.source is '{data.source}'; its {name} documents hold no text")
    tokenizer.save(work.corpus)
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
    write_manifest(work.corpus, manifest)
    work.corpus.rename(output)
    log_summary(manifest, log)
    log_lost_text(totals, tokenizer.tokens[tokenizer.unk_id], log)
    log(f"corpus: {output}")


def _tokenizer(config: Config, source: Source, folder: Path, log: Log) -> Tokenizer:
    """Returns the given tokenizer, or trains one, and keeps it in a folder: a kill does not cost the work."""
    t = config.tokenizer
    if folder.exists():
        log("tokenizer: made before, used again")
        return load_tokenizer(folder)
    if t.path:
        log(f"tokenizer: {t.path}{f' with the words of {t.extra_tokens_file}' * bool(t.extra_tokens_file)}")
        tokenizer = load_tokenizer(t.path, t.extra_tokens_file)
    else:
        with progress("sampling text", source.size, log) as show:
            sample = tokenizer_training.sample(source, config.data.validation_fraction, t.sample_bytes, show)
        size = sum(len(text.encode()) for text in sample)
        log(f"tokenizer: training {t.model_type}, vocabulary {t.vocab_size:,}, on {size:,} bytes")
        start = time.monotonic()
        tokenizer = tokenizer_training.train_tokenizer(sample, t)
        log(f"tokenizer: trained in {time.monotonic() - start:.1f} s")
    new = folder.with_suffix(".new")
    new.mkdir(exist_ok=True)
    tokenizer.save(new)
    new.rename(folder)
    return tokenizer
