"""Batches of an epoch: random order, examples of similar length together."""

from collections.abc import Iterator, Sequence

import numpy as np

_POOL = 32  # number of batches whose examples are sorted by length together

Batch = tuple[np.ndarray, ...]  # arrays whose first dimension is the examples


def num_batches(count: int, batch_size: int) -> int:
    """Number of batches in an epoch of `count` examples, at least 1."""
    return max(count // batch_size, 1)


def epoch_indices(lengths: Sequence[int], batch_size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yields the indices of each batch's examples.

    Examples that fill no whole batch are dropped; fewer examples than one batch are repeated.
    """
    order = np.resize(rng.permutation(len(lengths)), num_batches(len(lengths), batch_size) * batch_size)
    batches = []
    for begin in range(0, len(order), _POOL * batch_size):
        pool = sorted(order[begin : begin + _POOL * batch_size], key=lambda i: lengths[i])
        batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    for i in rng.permutation(len(batches)):
        yield [int(n) for n in batches[i]]
