"""Builds checked configs from ConfigDicts and from stored JSON, and lists their fields for the documentation."""

import re
import runpy
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from flax_mlm.config import validate
from flax_mlm.config.knobs import knob, knobs
from flax_mlm.config.phases import parse_phases
from flax_mlm.config.schema import Config
from flax_mlm.errors import UserError

BASE = Path(__file__).parents[2] / "configs" / "base.py"


def build(config_dict: ConfigDict) -> Config:
    """Turns a resolved ConfigDict into a checked `Config`.

    Raises:
      UserError: a field is missing or unknown, or has a value that is not allowed.
    """
    values = config_dict.to_dict()
    names = flatten(values).keys()
    if missing := knobs().keys() - names:
        raise UserError(f"config has no field '{min(missing)}'; start from configs/base.py")
    for name in sorted(names - knobs().keys()):
        knob(name)  # raises
    for section in fields(Config):
        if is_dataclass(section.type):
            values[section.name] = typing.cast(Any, section.type)(**values[section.name])
    config = Config(**values)
    validate.check(config)
    parse_phases(config)
    return config


def base() -> ConfigDict:
    """The defaults of configs/base.py."""
    return runpy.run_path(str(BASE))["get_config"]()


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """The ConfigDict of a config stored as JSON, the inverse of `Config.to_dict`; fields that did not exist when it
    was stored get their default."""
    config = base()
    with config.unlocked(), config.ignore_type():
        config.update(values)
    return config


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts into one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


class Entry(NamedTuple):
    """One field as a user sees it."""

    name: str
    type: str
    default: Any
    allowed: str
    comment: str


def entries() -> list[Entry]:
    """Every field with its default and comment from configs/base.py, in the order of the dataclasses."""
    defaults, comments, result = flatten(base().to_dict()), _comments(BASE.read_text()), []
    for name, field in knobs().items():
        allowed = " | ".join(field.allowed) if isinstance(field.allowed, tuple) else str(field.allowed or "")
        kind = field.type.__name__ + " or none" * field.optional
        result.append(Entry(name, kind, defaults[name], allowed, comments[name]))
    return result


def _comments(source: str) -> dict[str, str]:
    """Field -> the comment lines directly above its assignment and the comment behind it."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for line in map(str.strip, source.splitlines()):
        code, _, behind = line.rpartition("  # ") if "  # " in line else (line, "", "")
        if line.startswith("# "):
            above.append(line.removeprefix("# "))
            continue
        if match := re.match(r"c\.([\w.]+) = ", code):
            comments[match[1]] = " ".join(filter(None, [*above, behind]))
        above = []
    return comments
