"""Batches as a function of (corpora, seed, step): there is no state to save, and resuming is arithmetic.

Training rows form an endless stream; row i of the batch of a step is row first_row + step * B + i of the stream. A
`Stream` maps it to a corpus and a position p in the stream of that corpus alone, where it is row
permutation(seed, epoch)[p % N] with epoch = p // N. A host reads only the rows that it feeds.
"""

import atexit
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from flax_mlm.data.corpus import Rows
from flax_mlm.data.stream import Stream
from flax_mlm.data.tf import tensorflow
from flax_mlm.errors import UserError

Batch = dict[str, np.ndarray]  # this host's rows of a batch, see `train_batches`


def train_batches(
    rows: Rows,
    *,
    seed: int,
    global_batch_size: int,
    start_step: int = 0,
    stop_step: int = 1 << 32,
    first_row: int = 0,
    local_rows: np.ndarray | None = None,
    stream: Stream | None = None,
) -> Generator[Batch]:
    """Makes this host's rows of the batches of steps start_step, ..., stop_step - 1.

    Args:
      rows: training rows of all corpora, one corpus after another.
      seed: decides the order of the rows.
      global_batch_size: B, rows of a batch over all hosts.
      start_step, stop_step: range of batches.
      first_row: row of the stream where batch 0 begins.
      local_rows: int64 (n,), numbers below B of the rows that this host feeds (`batches.local_rows`); None: all.
      stream: interleaving of the corpora; None: there is one.

    Returns:
      A generator of dicts: tokens int32 (n, L), and row_ids uint32 (n, 2), high and low word of each row's number in
      the stream, which is unique over all corpora.

    Raises:
      UserError: there are no rows. The generator raises what `rows.read` raises.
    """
    own = np.arange(global_batch_size) if local_rows is None else local_rows
    stream = stream or Stream((rows.num_rows,))
    if not min(stream.num_rows):
        raise UserError("the corpus has no training rows; prepare one from more text")
    tf = tensorflow()
    failures: list[Exception] = []

    def read(index: np.ndarray) -> np.ndarray:
        try:
            return rows.read(index)
        except Exception as e:
            failures.append(e)
            raise

    def batch(step: Any) -> dict[str, Any]:
        row = first_row + step * global_batch_size + tf.constant(own, tf.int64)
        tokens = tf.numpy_function(read, [_row_indices(tf, stream, seed, row)], tf.int32, stateful=False)
        words = [tf.bitwise.right_shift(row, tf.constant(32, tf.int64)), row % (1 << 32)]
        row_ids = tf.cast(tf.stack(words, axis=1), tf.uint32)
        return {"tokens": tf.ensure_shape(tokens, (len(own), rows.seq_len)), "row_ids": row_ids}

    options = tf.data.Options()
    options.autotune.enabled = False  # every parameter is given, and its thread may take a minute to end
    dataset = tf.data.Dataset.range(start_step, stop_step).with_options(options)
    # Converting what autograph need not convert takes half a second.
    dataset = dataset.map(tf.autograph.experimental.do_not_convert(batch), 2, deterministic=True).prefetch(4)
    generator = _numpy_batches(tf, dataset, failures)
    # TensorFlow's threads call `read`; were they running at the interpreter's exit, both would wait for each other.
    atexit.register(generator.close)
    return generator


def _numpy_batches(tf: Any, dataset: Any, failures: list[Exception]) -> Generator[Batch]:
    """Iterates over a dataset; raises the first of `failures` in place of TensorFlow's report about it."""
    try:
        yield from dataset.as_numpy_iterator()
    except tf.errors.OpError:
        if failures:
            raise failures[0] from None
        raise


def _row_indices(tf: Any, stream: Stream, seed: int, row: Any) -> Any:
    """Maps rows of the stream, int64 (n,), to row numbers in all corpora one after another."""
    num_rows = tf.constant(stream.num_rows, tf.int64)
    orders = tf.constant(stream.orders or np.arange(len(stream.num_rows)), tf.int64)
    corpus, position = tf.numpy_function(stream.locate, [row], (tf.int64, tf.int64), stateful=False)
    index = _permuted(tf, tf.gather(orders, corpus), position, tf.gather(num_rows, corpus), seed)
    return index + tf.gather(tf.cumsum(num_rows, exclusive=True), corpus)


def _permuted(tf: Any, order: Any, position: Any, num_rows: Any, seed: int) -> Any:
    """Maps positions in the streams of single corpora, int64 (n,), to row numbers in each corpus."""
    epoch = position // num_rows + tf.bitwise.left_shift(order, tf.constant(40, tf.int64))  # unique over the corpora
    # RandomIndexShuffle is a cipher that uses its key as it is: with small numbers for a key, a thousand epochs had
    # only 256 orders among them, and 4 rounds left rows near their position. Hence random words as key, and 16 rounds.
    epochs, which = tf.unique(epoch, out_idx=tf.int64)

    def key(epoch: Any) -> Any:
        words = tf.stack([tf.constant(seed, tf.int64), epoch])
        return tf.random.stateless_uniform((3,), words, None, None, tf.uint32, alg="philox")

    keys = tf.gather(tf.map_fn(key, epochs, fn_output_signature=tf.uint32), which)
    return tf.raw_ops.RandomIndexShuffle(index=position % num_rows, seed=keys, max_index=num_rows - 1, rounds=16)


def eval_batches(rows: Rows, numbers: np.ndarray, *, batch_size: int, local_rows: np.ndarray) -> Iterator[Batch]:
    """Makes this host's rows of one pass over some rows of a split, in order; needs no TensorFlow.

    Args:
      rows: the split.
      numbers: int64 (n,) row numbers to be seen.
      batch_size: rows of a batch over all hosts.
      local_rows: int64 (n,), numbers below `batch_size` of the rows that this host feeds.

    Yields:
      Dicts as for training; row_ids hold the row's number in the split. Rows of padding fill the last batch.
    """
    for start in range(0, len(numbers), batch_size):
        is_real = start + local_rows < len(numbers)
        index = np.zeros(len(local_rows), np.int64)
        index[is_real] = numbers[start + local_rows[is_real]]
        tokens = np.full((len(local_rows), rows.seq_len), rows.pad_id, np.int32)
        tokens[is_real] = rows.read(index[is_real])
        yield {"tokens": tokens, "row_ids": np.stack([index >> 32, index & 0xFFFFFFFF], axis=1).astype(np.uint32)}
