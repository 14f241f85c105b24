"""Which row of which corpus comes at each place of the endless stream of training rows, as a function of the place.

The corpora take turns as evenly as their weights allow. Of two, the first has had round(n * w) of the first n rows, so
that row n is its own where that number grows, and otherwise the other's. Of more, the first half of them and the second
take turns in this way, and in each half its own two halves. So every corpus is at its share of any number of rows
within half a row for every halving, and within one row for up to four corpora; and what it has had is known for any n,
with no history. (Shares of this kind: Tijdeman, The chairman assignment problem, 1980.)
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from flax_mlm.data.mixture import Mixture

_LARGEST = 1 << 31  # of the sum of weights, so that their products fit into 64 bits


@dataclasses.dataclass(frozen=True)
class Stream:
    """The stream of several corpora, from one of its rows on.

    Attributes:
      num_rows: Training rows of each corpus.
      weights: Of each corpus, whole numbers (see `whole_numbers`) in proportion to its share; 0: it does not occur.
      first: The row of the stream that the weights hold from, and `starts` is the position of each corpus at.
      starts: How many of its rows each corpus has given before; empty: none.
      orders: A number of each corpus's own that the order of its rows follows from, with the seed; empty: 0, 1, 2, ...
    """

    num_rows: tuple[int, ...]
    weights: tuple[int, ...] = (1,)
    first: int = 0
    starts: tuple[int, ...] = ()
    orders: tuple[int, ...] = ()

    def locate(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the stream, int64 (B,) from `first` on -> the number of the corpus that each is from, int64 (B,),
        and its position in the endless stream of that corpus alone, int64 (B,)."""
        total_K = np.cumsum([0, *self.weights])
        low_B, high_B = np.zeros_like(row_B), np.full_like(row_B, len(self.weights))  # the corpora it can be from
        position_B = row_B - self.first  # among the rows of these
        for _ in range((len(self.weights) - 1).bit_length()):
            middle_B = (low_B + high_B) // 2
            part_B, whole_B = total_K[middle_B] - total_K[low_B], total_K[high_B] - total_K[low_B]
            before_B = _share(position_B, part_B, whole_B)
            is_left_B = _share(position_B + 1, part_B, whole_B) > before_B
            position_B = np.where(is_left_B, before_B, position_B - before_B)
            low_B, high_B = np.where(is_left_B, low_B, middle_B), np.where(is_left_B, middle_B, high_B)
        return low_B, position_B + np.array(self.starts or [0] * len(self.weights))[low_B]

    def positions(self, row: int) -> tuple[int, ...]:
        """How many rows each corpus has given before row `row` of the stream: where its next one begins, and the
        `starts` of a stream with other weights that goes on from there."""
        taken = counts(self.weights, row - self.first)
        return tuple(n + start for n, start in zip(taken, self.starts or [0] * len(taken), strict=True))

    def epochs(self, row: int) -> list[float]:
        """How often each corpus has been gone through before row `row` of the stream."""
        return [position / rows for position, rows in zip(self.positions(row), self.num_rows, strict=True)]


class DataCursor(NamedTuple):
    """Where in its text a run is: what has to be saved to read on, whatever it has read before."""

    row: int = 0  # of the run: how many it has had
    first: int = 0  # that of them since which the corpora and their weights are as they are
    taken: Mapping[str, int] = MappingProxyType({})  # how many rows a corpus, by its fingerprint, had given before that

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**self._asdict(), "taken": dict(self.taken)}

    def stream(self, corpus: "Mixture") -> Stream:
        """The stream that is read here. A corpus keeps its order, whichever others it is read with: that of its place
        among all that the run has read, in the order in which they came."""
        names = [part.fingerprint for part in corpus.corpora.values()]
        numbers = {name: number for number, name in enumerate(dict.fromkeys([*self.taken, *names]))}
        starts, orders = tuple(self.taken.get(name, 0) for name in names), tuple(numbers[name] for name in names)
        return dataclasses.replace(corpus.stream(), first=self.first, starts=starts, orders=orders)

    def turned(self, before: "Mixture") -> "DataCursor":
        """The place from which on other corpora than before are read, or with other weights, each from where it was."""
        here = self.stream(before).positions(self.row)
        names = (part.fingerprint for part in before.corpora.values())
        return DataCursor(self.row, self.row, {**self.taken, **dict(zip(names, here, strict=True))})


def counts(weights: Sequence[int], n: int) -> list[int]:
    """How many of the first n rows are of each corpus; the sum is n."""
    if len(weights) == 1:
        return [n]
    half = len(weights) // 2
    left = _share(n, sum(weights[:half]), sum(weights)) if any(weights) else 0
    return counts(weights[:half], left) + counts(weights[half:], n - left)


def _share(n: Any, part: Any, whole: Any) -> Any:
    """round(n * part / whole), of whole numbers or int64 arrays; grows by at most 1 with n."""
    return n // whole * part + (n % whole * part + whole // 2) // whole


def whole_numbers(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Positive weights as whole numbers in the same proportion, exactly where their sum stays below 2**31."""
    common = math.lcm(*(w.denominator for w in weights))
    numbers = [int(w * common) for w in weights]
    numbers = [n // math.gcd(*numbers) for n in numbers]
    if (total := sum(numbers)) > _LARGEST:
        numbers = [max(1, n * _LARGEST // total) for n in numbers]
    return tuple(numbers)
