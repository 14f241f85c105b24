"""Tokenising chunks of text, in this process or in others."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np

from flax_mlm.data.corpus import row_dtype
from flax_mlm.data.sources.base import TextChunk
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.errors import UserError
from flax_mlm.storage.gcs import AnyPath

JOB_CHARS = 1 << 20  # that a worker tokenises at a time

# The C chunks of a job; ids (T,) of `row_dtype`; int64 (C, 3) number of tokens, words and bytes in each chunk.
Tokenised: TypeAlias = tuple[list[TextChunk], np.ndarray, np.ndarray]
_Tokens: TypeAlias = tuple[np.ndarray, np.ndarray]
_Content: TypeAlias = tuple[str, np.ndarray | None]  # text of a chunk, and its ids where the source gives them


def make_jobs(chunks: Iterable[TextChunk]) -> Iterator[list[TextChunk]]:
    """Groups chunks into jobs of about `JOB_CHARS`, none of which crosses the end of a part."""
    job: list[TextChunk] = []
    size = 0
    for chunk in chunks:
        if job and (size >= JOB_CHARS or chunk.part_key != job[0].part_key):
            yield job
            job, size = [], 0
        job.append(chunk)
        size += len(chunk.text)
    if job:
        yield job


def tokenise_in_processes(
    jobs: Iterable[list[TextChunk]], tokenizer_path: AnyPath, num_workers: int
) -> Iterator[Tokenised]:
    """Tokenises jobs in other processes, in order. Raises UserError if one of them was killed."""
    pending: deque[tuple[list[TextChunk], concurrent.futures.Future[_Tokens]]] = deque()
    with workers(num_workers, tokenizer_path) as pool:
        for job in jobs:
            pending.append((job, pool.submit(_tokenise_in_worker, _contents(job))))
            if len(pending) > 2 * num_workers:
                first, future = pending.popleft()
                yield first, *future.result()
        for last, future in pending:
            yield last, *future.result()


@contextlib.contextmanager
def workers(num_workers: int, tokenizer_path: AnyPath | None = None) -> Iterator[concurrent.futures.Executor]:
    """Starts processes that end with this one. Raises UserError if one of them was killed."""
    # Spawned, not forked: this process may run threads of JAX or TensorFlow.
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, spawn, _start_worker, (tokenizer_path,))
    try:
        yield pool
    except concurrent.futures.BrokenExecutor as e:
        raise UserError("a worker was killed, perhaps for lack of memory; lower data.num_workers and run again") from e
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_path: AnyPath | None) -> None:
    global _worker_tokenizer
    if tokenizer_path:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process per core already
        _worker_tokenizer = load_tokenizer(tokenizer_path)
        _worker_tokenizer.num_threads = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this process when its parent is killed, which workers of a pool outlive otherwise."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _tokenise_in_worker(contents: list[_Content]) -> _Tokens:
    return _tokenise(contents, _worker_tokenizer)


def tokenise_here(jobs: Iterable[list[TextChunk]], tokenizer: Tokenizer) -> Iterator[Tokenised]:
    """Tokenises jobs in this process."""
    return ((job, *_tokenise(_contents(job), tokenizer)) for job in jobs)


def _contents(job: list[TextChunk]) -> list[_Content]:
    return [(chunk.text, chunk.ids) for chunk in job]


def _tokenise(contents: list[_Content], tokenizer: Tokenizer) -> _Tokens:
    encoded = iter(tokenizer.encode([text for text, given in contents if given is None]))
    ids = [next(encoded) if given is None else given for _, given in contents]
    sizes = [[len(i), len(text.split()), len(text.encode())] for (text, _), i in zip(contents, ids, strict=True)]
    return np.concatenate(ids).astype(row_dtype(tokenizer.vocab_size)), np.array(sizes, np.int64)
