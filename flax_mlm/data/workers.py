"""Tokenising text in other processes."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeAlias

import numpy as np

from flax_mlm.data.corpus import row_dtype
from flax_mlm.data.sources import TextChunk
from flax_mlm.data.tokenizer.base import Tokenizer
from flax_mlm.data.tokenizer.load import load_tokenizer
from flax_mlm.errors import UserError

# The C chunks of a job; ids (T,) of `row_dtype`; int64 (C, 3) number of tokens, words and bytes in each chunk.
Tokenised: TypeAlias = tuple[list[TextChunk], np.ndarray, np.ndarray]


def tokenise(jobs: Iterable[list[TextChunk]], tokenizer_path: Path, num_workers: int) -> Iterator[Tokenised]:
    """Tokenises jobs in `num_workers` processes (0: one per core), in order.

    Raises:
      UserError: a worker was killed.
    """
    num_workers = num_workers or os.cpu_count() or 1
    # Spawned, not forked: this process may run threads of JAX or TensorFlow.
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, spawn, _start_worker, (tokenizer_path,))
    pending: deque[tuple[list[TextChunk], concurrent.futures.Future[tuple[np.ndarray, np.ndarray]]]] = deque()
    try:
        for job in jobs:
            pending.append((job, pool.submit(_tokenise, [chunk.text for chunk in job])))
            if len(pending) > 2 * num_workers:
                first, future = pending.popleft()
                yield first, *future.result()
        for last, future in pending:
            yield last, *future.result()
    except BrokenProcessPool as e:
        raise UserError("a worker was killed, perhaps for lack of memory; lower data.num_workers and run again") from e
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_path: Path) -> None:
    global _worker_tokenizer
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


def _tokenise(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    ids = _worker_tokenizer.encode(texts)
    sizes = [[len(i), len(text.split()), len(text.encode())] for text, i in zip(texts, ids, strict=True)]
    return np.concatenate(ids).astype(row_dtype(_worker_tokenizer.vocab_size)), np.array(sizes, np.int64)
