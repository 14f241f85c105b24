"""Documents -> tokenizer -> packed corpus."""

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from flax_mlm.config.schema import Config
from flax_mlm.data import corpus as corpus_lib
from flax_mlm.data import sources, writer
from flax_mlm.data.corpus import Corpus
from flax_mlm.data.tokenizer.base import Tokenizer
from flax_mlm.data.tokenizer.load import load_tokenizer
from flax_mlm.data.tokenizer.train import train_tokenizer
from flax_mlm.errors import UserError
from flax_mlm.storage import files

CHUNK = 1 << 20  # characters that a worker takes at a time

Log = Callable[[str], None]
Chunk = list[sources.TextChunk]


def prepare(config: Config, output: str | Path, log: Log = print) -> Corpus:
    """Makes a corpus in the folder `output`, or opens the one that is there if it is the same.

    Raises:
      UserError: the source cannot be read, or `output` holds something else.
    """
    source = sources.open_source(config.data.source)
    return _prepare(config, source, _request(config, source), output, log)


def prepare_cached(config: Config, log: Log = print) -> Corpus:
    """The corpus that the config describes, from data.cache_dir, made there first if need be."""
    source = sources.open_source(config.data.source)
    request = _request(config, source)
    name = re.sub(r"[^A-Za-z0-9]+", "-", config.data.source).strip("-")[:40]
    return _prepare(config, source, request, Path(config.data.cache_dir) / f"{name}-{request[:16]}", log)


def _prepare(config: Config, source: sources.Source, request: str, output: str | Path, log: Log) -> Corpus:
    if "://" in str(output):
        raise UserError(f"the output is {output}; prepare writes to a local folder, which you can copy there")
    output = Path(output).expanduser().absolute()
    work = output.with_name(output.name + ".tmp")
    try:
        if _is_done(output, request) and not work.exists():
            log(f"corpus: {output}, already prepared")
            return Corpus.open(output)
        with _lock(work, log):
            try:
                if not _is_done(output, request):  # another process may have made it while we waited
                    _make(config, source, request, output, work, log)
            except UserError:
                if not any(work.glob("*.npz")):  # tokenised text is worth keeping; nothing else is
                    shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(work, ignore_errors=True)
    except OSError as e:
        impossible = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, *impossible):
            raise UserError(f"cannot write {output}: {e.strerror}; once mended, run it again and it continues") from e
        raise
    return Corpus.open(output)


def _request(config: Config, source: sources.Source) -> str:
    """Hash of all that decides the bytes of the corpus."""
    d = config.data
    return _hash(
        [corpus_lib.FORMAT, source.version, _tokenizer_options(config), d.seq_len, d.packing, d.validation_every]
    )


def _tokenizer_options(config: Config) -> Any:
    t = config.tokenizer
    if t.path:
        return load_tokenizer(t.path, t.extra_tokens_file).fingerprint
    return [t.model_type, t.vocab_size, t.normalization, t.character_coverage, t.sample_bytes]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _is_done(output: Path, request: str) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / corpus_lib.MANIFEST).exists():
        raise UserError(f"the output, {output}, exists and is not a corpus; name another folder")
    if Corpus.open(output).manifest["request"] != request:
        raise UserError(f"{output} holds a corpus of other text or settings; name another folder, or delete that one")
    return True


@contextlib.contextmanager
def _lock(work: Path, log: Log) -> Iterator[None]:
    """Makes the work folder, ours alone until the block ends."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        # Whoever held the lock before us may have finished, and be removing the folder.
        with contextlib.suppress(FileNotFoundError):
            file = (work / "lock").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"another process is at work in {work}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), (work / "lock").stat()):
                break
    with file:
        yield


def _make(config: Config, source: sources.Source, request: str, output: Path, work: Path, log: Log) -> None:
    log(f"source: {source.name}; licence: {source.licence}")
    _check_enough(source, config.data.validation_every)
    tokenizer_path = _tokenizer(config, source, work, log)
    tokenizer = load_tokenizer(tokenizer_path)

    folder = work / "corpus"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    counts: Counter[str] = Counter()
    parts = _progress("tokenising", source, counts, log)
    seq_len, packing = config.data.seq_len, config.data.packing
    split_writers = [writer.Writer(folder, name, seq_len, tokenizer, packing) for name in corpus_lib.SPLITS]
    train_split, validation = split_writers
    for ids, table in _tokenised(_chunks(parts), tokenizer_path, work, config.data.num_workers, log):
        held_out = (table[:, 0] + 1) % config.data.validation_every == 0
        of_token = np.repeat(held_out, table[:, 1])
        validation.add(ids[of_token], table[held_out])
        train_split.add(ids[~of_token], table[~held_out])
    splits = {w.split: w.finish() for w in split_writers}
    for name, split in splits.items():
        if not split["rows"]:
            raise UserError(f"data.source is '{config.data.source}'; its {name} documents hold no text")

    tokenizer.save(folder)
    manifest = {
        "format": corpus_lib.FORMAT,
        "request": request,
        "source": {"name": source.name, "licence": source.licence, "counts": dict(sorted(counts.items()))},
        "tokenizer": {
            "file": tokenizer.filename,
            "size": len(tokenizer.content),
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "pad_id": tokenizer.pad_id,
        },
        "seq_len": seq_len,
        "packing": packing,
        "validation_every": config.data.validation_every,
        "dtype": corpus_lib.row_dtype(tokenizer.vocab_size).name,
        "splits": splits,
    }
    writer.write_manifest(folder, manifest)
    folder.rename(output)
    for line in summary(manifest):
        log(line)
    log(f"corpus: {output}")


def summary(manifest: dict[str, Any]) -> list[str]:
    """What is in a corpus, and what was odd about its text, as lines to print."""
    lines = []
    for name, s in manifest["splits"].items():
        lines.append(
            f"{name}: {s['documents']:,} documents, {s['words']:,} words, {s['bytes']:,} bytes, {s['tokens']:,} tokens "
            f"({s['tokens'] / s['bytes']:.3f} per byte), {s['rows']:,} rows, "
            f"{s['padding'] / (s['rows'] * manifest['seq_len']):.2%} padding"
        )
    counts = Counter(manifest["source"]["counts"])
    if counts["undecodable_bytes"]:
        where = f" in {counts['undecodable_files']:,} files" if counts["undecodable_files"] else ""
        lines.append(f"warning: {counts['undecodable_bytes']:,} bytes{where} were not UTF-8 and became U+FFFD")
    for what in ("empty_files", "empty_documents"):
        if counts[what]:
            lines.append(f"warning: {counts[what]:,} {what.replace('_', ' ')}")
    return lines


def _check_enough(source: sources.Source, validation_every: int) -> None:
    """Early, rather than after the work: is there a document to hold out?"""
    documents = 0
    for _, number, _ in source.chunks(Counter()):
        documents = number + 1
        if documents == validation_every:
            return
    if documents == 0:
        raise UserError(f"the source, {source.name}, holds no text")
    if documents == 1:
        raise UserError(f"the source, {source.name}, is one document, so none can be held out; give it as several")
    raise UserError(
        f"data.validation_every is {validation_every}, but the source, {source.name}, has {documents} documents, so "
        f"none would be held out; set it to {documents} or less"
    )


def _tokenizer(config: Config, source: sources.Source, work: Path, log: Log) -> Path:
    """Where the tokenizer is: the one given, one trained before a kill, or one trained now."""
    t, n = config.tokenizer, config.data.validation_every
    if t.path:
        log(f"tokenizer: {t.path}{f' with the words of {t.extra_tokens_file}' * bool(t.extra_tokens_file)}")
        folder = work / "tokenizer.given"
        folder.mkdir(exist_ok=True)
        load_tokenizer(t.path, t.extra_tokens_file).save(folder)
        return folder
    folder = work / f"tokenizer-{_hash([source.version, _tokenizer_options(config), n])[:16]}"
    if folder.exists():
        log("tokenizer: trained before, used again")
        return folder
    parts = _progress("sampling text", source, Counter(), log)
    sample = _sample((text for _, document, text in parts if (document + 1) % n), t.sample_bytes)
    size = sum(len(text.encode()) for text in sample)
    log(f"tokenizer: training {t.model_type}, vocabulary {t.vocab_size:,}, on {size:,} bytes")
    start = time.monotonic()
    new = work / "tokenizer.new"
    new.mkdir(exist_ok=True)
    train_tokenizer(sample, t).save(new)
    new.rename(folder)
    log(f"tokenizer: trained in {time.monotonic() - start:.1f} s")
    return folder


def _sample(texts: Iterable[str], size: int) -> list[str]:
    """At most `size` bytes: every text, or every 2nd, 4th, 8th ... of them, as few as it takes."""
    kept: list[str] = []
    total, every = 0, 1
    for n, text in enumerate(texts):
        if n % every == 0:
            kept.append(text)
            total += len(text.encode())
        while total > size and len(kept) > 1:
            kept, every = kept[::2], 2 * every
            total = sum(len(t.encode()) for t in kept)
    return kept


def _chunks(parts: Iterable[sources.TextChunk]) -> Iterator[Chunk]:
    chunk: Chunk = []
    size = 0
    for part in parts:
        chunk.append(part)
        size += len(part.text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenised(
    chunks: Iterable[Chunk], tokenizer_path: Path, work: Path, num_workers: int, log: Log
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokenises chunks in other processes, and gives them in order. Each is kept as a file, in case we are killed.

    Yields:
      ids (T,), and an int64 table (P, 4) with a row per part: number of its document, tokens, words, bytes.
    """
    fingerprint = load_tokenizer(tokenizer_path).fingerprint
    num_workers = num_workers or os.cpu_count() or 1
    # Spawned, not forked: the parent may run threads of JAX or TensorFlow.
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, spawn, _start_worker, (tokenizer_path,))
    pending: deque[tuple[Path, concurrent.futures.Future[None] | None]] = deque()
    reused = 0

    def first() -> tuple[np.ndarray, np.ndarray]:
        file, future = pending.popleft()
        if future:
            future.result()
        with np.load(file) as arrays:
            return arrays["ids"], arrays["table"]

    try:
        for chunk in chunks:
            file = work / f"{_hash([fingerprint, chunk])[:32]}.npz"
            reused += file.exists()
            pending.append((file, None if file.exists() else pool.submit(_tokenise, chunk, file)))
            if len(pending) > 2 * num_workers:
                yield first()
        while pending:
            yield first()
    except BrokenProcessPool as e:
        raise UserError("a worker was killed, perhaps for want of memory; lower data.num_workers, run again") from e
    finally:
        pool.shutdown(cancel_futures=True)
    if reused:
        log(f"tokenising: {reused} chunks of text were done before and used again")


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_path: Path) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process per core is enough
    _worker_tokenizer = load_tokenizer(tokenizer_path)
    _worker_tokenizer.num_threads = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Otherwise a pool's workers outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _tokenise(chunk: Chunk, file: Path) -> None:
    tokenizer = _worker_tokenizer
    ids = tokenizer.encode([part.text for part in chunk])
    table = [[d, len(i), len(text.split()), len(text.encode())] for (_, d, text), i in zip(chunk, ids, strict=True)]
    buffer = io.BytesIO()
    dtype = corpus_lib.row_dtype(tokenizer.vocab_size)
    np.savez(buffer, ids=np.concatenate(ids).astype(dtype), table=np.array(table, np.int64))
    files.write_bytes(file, buffer.getbuffer())


def _progress(what: str, source: sources.Source, counts: Counter[str], log: Log) -> Iterator[sources.TextChunk]:
    """The parts of a source, with a bar on a terminal and a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=source.size)
            for part in source.chunks(counts):
                bar.update(task, completed=counts["read"])
                yield part
        return
    start = said = time.monotonic()
    for part in source.chunks(counts):
        if (now := time.monotonic()) - said > 10:
            done, said = counts["read"] / max(source.size, 1), now
            left = (now - start) * (1 / done - 1) if done else float("inf")
            log(f"{what}: {done:.0%}, {left:.0f} s left")
        yield part
