"""Interleaving of several corpora into one endless stream of training rows, as a function of the row number.

Corpora are interleaved deterministically by weight. Of two, the first has given round(n * w) of the first n rows, so
row n is from the first corpus where that count grows, and from the second otherwise. More than two are halved
recursively: the two halves are interleaved like two corpora, and each half interleaves its own two halves. Counts
deviate from the weights by at most half a row for every halving, so by at most one row for up to four corpora, and are
known for any n without history (Tijdeman, The chairman assignment problem, 1980).
"""

import dataclasses
import decimal
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

_MAX_SUM = 1 << 31  # of the weights, so that their products fit into 64 bits


@dataclasses.dataclass(frozen=True)
class Stream:
    """The stream of several corpora from row `first` on.

    Attributes:
      num_rows: number of training rows of each corpus.
      weights: whole numbers (see `whole_numbers`) in proportion to the rows taken from each corpus; 0 takes none.
      first: row of the stream from which the weights hold.
      starts: number of rows that each corpus had given before row `first`; empty: none.
      orders: number of each corpus that its row order follows from, together with the seed; empty: 0, 1, 2, ...
    """

    num_rows: tuple[int, ...]
    weights: tuple[int, ...] = (1,)
    first: int = 0
    starts: tuple[int, ...] = ()
    orders: tuple[int, ...] = ()

    def locate(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds the corpus of rows of the stream, and their positions in the endless stream of that corpus alone.

        Args:
          row_B: int64 (B,), from `first` on.

        Returns:
          int64 (B,) index of the corpus, int64 (B,) position.
        """
        total_K = np.cumsum([0, *self.weights])
        low_B, high_B = np.zeros_like(row_B), np.full_like(row_B, len(self.weights))  # range of corpora still possible
        position_B = row_B - self.first  # among the rows of that range
        for _ in range((len(self.weights) - 1).bit_length()):
            middle_B = (low_B + high_B) // 2
            left_B, both_B = total_K[middle_B] - total_K[low_B], total_K[high_B] - total_K[low_B]
            before_B = _proportion(position_B, left_B, both_B)
            is_left_B = _proportion(position_B + 1, left_B, both_B) > before_B
            position_B = np.where(is_left_B, before_B, position_B - before_B)
            low_B, high_B = np.where(is_left_B, low_B, middle_B), np.where(is_left_B, middle_B, high_B)
        return low_B, position_B + np.array(self.starts or [0] * len(self.weights))[low_B]

    def positions(self, row: int) -> tuple[int, ...]:
        """Counts the rows that each corpus has given before row `row`: the `starts` of a stream that continues there
        with other weights."""
        given = counts(self.weights, row - self.first)
        return tuple(n + start for n, start in zip(given, self.starts or [0] * len(given), strict=True))

    def epochs(self, row: int) -> list[float]:
        """Counts the epochs of each corpus before row `row`."""
        return [position / rows for position, rows in zip(self.positions(row), self.num_rows, strict=True)]


def counts(weights: Sequence[int], n: int) -> list[int]:
    """Counts how many of the first n rows are from each corpus; the sum is n."""
    if len(weights) == 1:
        return [n]
    half = len(weights) // 2
    left = _proportion(n, sum(weights[:half]), sum(weights)) if any(weights) else 0
    return counts(weights[:half], left) + counts(weights[half:], n - left)


def _proportion(n: Any, part: Any, whole: Any) -> Any:
    """Computes round(n * part / whole) of ints or int64 arrays; grows by at most 1 with n."""
    return n // whole * part + (n % whole * part + whole // 2) // whole


def whole_numbers(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Scales positive weights to whole numbers, exactly in proportion where their sum stays below 2**31."""
    common = math.lcm(*(w.denominator for w in weights))
    numbers = [int(w * common) for w in weights]
    numbers = [n // math.gcd(*numbers) for n in numbers]
    if (total := sum(numbers)) > _MAX_SUM:
        numbers = [max(min(n, 1), n * _MAX_SUM // total) for n in numbers]
    return tuple(numbers)


def power_weights(sizes: Sequence[int], alpha: float) -> list[Fraction]:
    """Computes sizes ** alpha to 40 digits, the same on every machine: powers of floats differ in their last bits."""
    with decimal.localcontext(decimal.Context(prec=40)):
        exponent = decimal.Decimal(repr(alpha))
        return [Fraction(decimal.Decimal(size) ** exponent if size and alpha != 1.0 else size) for size in sizes]
