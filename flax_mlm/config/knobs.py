"""The config's fields by dotted name, such as `train.steps`: their types, allowed values, and how users write them."""

import difflib
import functools
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from flax_mlm.config.allowed import Interval
from flax_mlm.config.schema import Config
from flax_mlm.errors import UserError


class Knob(NamedTuple):
    """One field of the config."""

    type: type
    optional: bool  # may be None
    allowed: Interval | tuple[str, ...] | None  # None: every value of the type
    in_phases: str  # "changeable", "interpolated" (also by `a->b`), or "" for fields that phases cannot change


@functools.cache
def knobs() -> dict[str, Knob]:
    """Every field of the config, by its dotted name, in the order of the dataclasses."""

    def section(cls: Any, prefix: str) -> dict[str, Knob]:
        result: dict[str, Knob] = {}
        for f in fields(cls):
            if is_dataclass(f.type):
                result |= section(f.type, f"{f.name}.")
            else:
                options = typing.get_args(f.type) or (f.type,)
                allowed, in_phases = f.metadata.get("allowed"), f.metadata.get("in_phases", "")
                result[prefix + f.name] = Knob(options[0], types.NoneType in options, allowed, in_phases)
        return result

    return section(Config, "")


def knob(path: str) -> Knob:
    """One field of the config. Raises UserError, with the nearest name, if there is no such field."""
    if path not in knobs():
        near = difflib.get_close_matches(path, knobs(), n=1, cutoff=0.5)
        near = near or [name for name in knobs() if name.endswith("." + path.rsplit(".", 1)[-1])]
        hint = f"did you mean '{near[0]}'?" if near else "--print_config lists all fields"
        raise UserError(f"config has no field '{path}'; {hint}")
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
