"""Metadata of the config's fields: the values that a field may have, and whether phases of a run may change it."""

import functools
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Interval:
    """An interval of numbers, written as in mathematics: `[0, 1)` contains 0 but not 1."""

    text: str

    @functools.cached_property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound."""
        low, high = self.text[1:-1].split(",")
        return float(low), float(high)

    def __contains__(self, value: float) -> bool:
        low, high = self.bounds
        is_above = value >= low if self.text[0] == "[" else value > low
        return is_above and (value <= high if self.text[-1] == "]" else value < high)

    def __str__(self) -> str:
        low, high = self.bounds
        if high < math.inf:
            return f"in {self.text}"
        return f"at least {low:g}" if self.text[0] == "[" else f"above {low:g}"


def within(interval: str) -> dict[str, Any]:
    """Metadata of a numeric field whose values lie in an interval such as `[0, 1)`."""
    return {"allowed": Interval(interval)}


def at_least(low: int) -> dict[str, Any]:
    """Metadata of a numeric field with a smallest value."""
    return within(f"[{low}, inf)")


def one_of(*choices: str) -> dict[str, Any]:
    """Metadata of a text field with these values."""
    return {"allowed": choices}


PROBABILITY = within("[0, 1]")
POSITIVE_FRACTION = within("(0, 1]")
RATE = within("[0, 1)")
OPEN_FRACTION = within("(0, 1)")
POSITIVE = within("(0, inf)")
CHANGEABLE = {"in_phases": "changeable"}
INTERPOLATED = {"in_phases": "interpolated"}  # also by `a->b`
