"""The config's fields by dotted name, such as `train.steps`: their types, allowed values, and how users write them."""

import functools
import math
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

from flax_mlm.config.schema import CHANGEABLE, FROM_FOLDER, INTERPOLATED, Config
from flax_mlm.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Interval:
    """An interval of numbers, written as in mathematics: `[0, 1)` contains 0 but not 1."""

    text: str
    low: float
    high: float

    def __contains__(self, value: Any) -> bool:
        is_inside = self.low < value < self.high
        return is_inside or (self.text[0] == "[" and value == self.low) or (self.text[-1] == "]" and value == self.high)

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"in {self.text}"
        return f"at least {self.low:g}" if self.text[0] == "[" else f"above {self.low:g}"


class Knob(NamedTuple):
    """One field of the config."""

    type: type
    optional: bool  # may be None
    allowed: Interval | tuple[str, ...] | None  # None: every value of the type
    in_phases: str  # CHANGEABLE, INTERPOLATED, or "" for fields that phases cannot change


@functools.cache
def knobs() -> dict[str, Knob]:
    """Every field of the config, by its dotted name, in the order of the dataclasses."""
    result: dict[str, Knob] = {}
    for f in fields(Config):
        if is_dataclass(f.type):
            result |= {f"{f.name}.{inner.name}": _knob(inner.type) for inner in fields(f.type)}
        else:
            result[f.name] = _knob(f.type)
    return result


def _knob(annotation: Any) -> Knob:
    """Reads a field's annotation, such as `Annotated[float, "[0, 1)", CHANGEABLE]`."""
    kind, *notes = typing.get_args(annotation) if hasattr(annotation, "__metadata__") else [annotation]
    options = typing.get_args(kind) or (kind,)
    allowed: Interval | tuple[str, ...] | None = None
    in_phases = ""
    for note in notes:
        if note in (CHANGEABLE, INTERPOLATED):
            in_phases = note
        elif note == FROM_FOLDER:
            options = (*options, types.NoneType)
        elif note[0] in "[(":
            allowed = Interval(note, *map(float, note[1:-1].split(",")))
        else:
            allowed = tuple(note.split(" | "))
    return Knob(options[0], types.NoneType in options, allowed, in_phases)


def knob(path: str) -> Knob:
    """One field of the config. Raises UserError, with the nearest name, if there is no such field."""
    if path not in knobs():
        ends = [name for name in knobs() if name.endswith("." + path.rsplit(".", 1)[-1])]
        otherwise = f"did you mean '{ends[0]}'?" if ends else "--print_config lists all fields"
        raise UserError(f"config has no field '{path}'; {did_you_mean(path, knobs(), otherwise)}")
    return knobs()[path]


def value_of(config: Config, path: str) -> Any:
    """The value of a field, by its dotted name."""
    return functools.reduce(getattr, path.split("."), config)


def parse(path: str, text: str) -> Any:
    """Converts what a user wrote to the type of a field; `none` to None, `1_000_000` and `1e6` to an int.

    Raises:
      UserError: there is no such field, or the text is not of its type.
    """
    kind = knob(path).type
    if knob(path).optional and text.lower() == "none":
        return None
    try:
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        if kind is float:
            return float(text)
        if kind is int:
            try:
                return int(text)
            except ValueError:
                if not float(text).is_integer():
                    raise
                return int(float(text))
    except (ValueError, KeyError, OverflowError):
        expected = {bool: "true or false", float: "a number", int: "a whole number"}[kind]
        raise UserError(f"--config.{path} is '{text}'; expected {expected}") from None
    return text


def spell(value: Any) -> str:
    """A value as the command line spells it, the inverse of `parse`."""
    return "none" if value is None else str(value)
