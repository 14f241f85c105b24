"""Batches as a function of (corpora, seed, step): there is no state to save, and resuming is arithmetic.

The rows of training are an endless stream; a slot of a step is its row first_row + step * B + slot. A `Stream` says
which corpus that one is from, and its position p among the rows of that corpus alone, where it is row
permutation(seed, epoch)[i], with epoch = p // N and i = p % N. A host reads only the slots that it feeds.
"""

import atexit
import functools
import os
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from flax_mlm.data.corpus import Rows
from flax_mlm.data.stream import Stream
from flax_mlm.errors import UserError


@functools.cache
def tensorflow() -> Any:
    """TensorFlow, quiet, and kept off accelerators, which are JAX's."""
    # Without the second, the first does not silence a line about the rounding of operations that we do not use.
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf


def train_batches(
    rows: Rows,
    *,
    seed: int,
    global_batch_size: int,
    start_step: int = 0,
    stop_step: int = 1 << 32,
    first_row: int = 0,
    slots: np.ndarray | None = None,
    stream: Stream | None = None,
) -> Generator[dict[str, np.ndarray]]:
    """This host's share of the batches of steps start_step, ..., stop_step - 1.

    Args:
      rows: Those of all corpora, one corpus after another.
      seed: The order of the rows follows from it.
      global_batch_size: B, rows over all hosts.
      start_step, stop_step: Which batches.
      first_row: Of the stream, where batch 0 begins.
      slots: int64 (n,), numbers below B of the rows of each batch that this host feeds (`batches.local_rows`); None:
        all.
      stream: How the corpora take turns; None: there is one.

    Returns:
      A generator of dicts: tokens int32 (n, L), and row_ids uint32 (n, 2), the high and the low word of each row's
      number in the stream: no two rows have the same, of whatever corpus they are.

    Raises:
      UserError: there are no rows. The generator raises what `rows.read` raises, as it is.
    """
    own = np.arange(global_batch_size) if slots is None else slots
    order = stream or Stream((rows.num_rows,))
    if not min(order.num_rows):
        raise UserError("the corpus has no training rows; prepare one from more text")
    tf = tensorflow()

    failures: list[Exception] = []

    def read(index: np.ndarray) -> np.ndarray:
        try:
            return rows.read(index)
        except Exception as e:
            failures.append(e)
            raise

    num_rows = tf.constant(order.num_rows, tf.int64)
    orders = tf.constant(order.orders or range(len(order.num_rows)), tf.int64)

    def batch(step: Any) -> dict[str, Any]:
        row = first_row + step * global_batch_size + tf.constant(own, tf.int64)
        corpus, position = tf.numpy_function(order.locate, [row], (tf.int64, tf.int64), stateful=False)
        index = _permuted(tf, tf.gather(orders, corpus), position, tf.gather(num_rows, corpus), seed)
        index += tf.gather(tf.cumsum(num_rows, exclusive=True), corpus)
        tokens = tf.numpy_function(read, [index], tf.int32, stateful=False)
        high, low = (tf.bitwise.right_shift(row, tf.constant(32, tf.int64)), row % (1 << 32))
        row_ids = tf.cast(tf.stack([high, low], axis=1), tf.uint32)
        return {"tokens": tf.ensure_shape(tokens, (len(own), rows.seq_len)), "row_ids": row_ids}

    dataset = tf.data.Dataset.range(start_step, stop_step)
    options = tf.data.Options()
    options.autotune.enabled = False  # all numbers are given, and its thread may take a minute to end
    dataset = dataset.map(batch, num_parallel_calls=2, deterministic=True).prefetch(4).with_options(options)

    def batches() -> Generator[dict[str, np.ndarray]]:
        try:
            yield from dataset.as_numpy_iterator()
        except tf.errors.OpError:  # a page of TensorFlow about what `read` has raised
            if failures:
                raise failures[0] from None
            raise

    generator = batches()
    # TensorFlow's threads call `read`: still doing so when the interpreter goes down, they and it wait for each other.
    atexit.register(generator.close)
    return generator


def _permuted(tf: Any, order: Any, position: Any, num_rows: Any, seed: int) -> Any:
    """int64 (n,): positions in the streams of corpora with these orders and so many rows -> row numbers in each."""
    epoch = position // num_rows + tf.bitwise.left_shift(order, tf.constant(40, tf.int64))  # of this corpus alone
    # The op is a cipher that uses its key as it is: with small numbers for a key, a thousand epochs had only 256
    # orders among them, and four rounds left rows near their place. So: a key of random words, and more rounds.
    epochs, which = tf.unique(epoch, out_idx=tf.int64)
    keys = tf.map_fn(
        lambda e: tf.random.stateless_uniform(
            (3,), tf.stack([tf.constant(seed, tf.int64), e]), None, None, tf.uint32, alg="philox"
        ),
        epochs,
        fn_output_signature=tf.uint32,
    )
    return tf.raw_ops.RandomIndexShuffle(
        index=position % num_rows, seed=tf.gather(keys, which), max_index=num_rows - 1, rounds=16
    )


def eval_batches(
    rows: Rows, numbers: np.ndarray, *, batch_size: int, slots: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """This host's share of one pass over some rows of a split, in order; needs no TensorFlow.

    Args:
      rows: The split.
      numbers: int64 (n,), those to be seen.
      batch_size: Rows over all hosts.
      slots: As for training.

    Yields:
      As for training, with row_ids of the row's number in the split. Rows of only padding fill the last batch.
    """
    own = np.arange(batch_size) if slots is None else slots
    for start in range(0, len(numbers), batch_size):
        real = start + own < len(numbers)
        index = np.zeros(len(own), np.int64)
        index[real] = numbers[start + own[real]]
        tokens = np.full((len(own), rows.seq_len), rows.pad_id, np.int32)
        tokens[real] = rows.read(index[real])
        row_ids = np.stack([index >> 32, index & 0xFFFFFFFF], axis=1).astype(np.uint32)
        yield {"tokens": tokens, "row_ids": row_ids}
