"""Builds checked configs from ConfigDicts and from stored JSON."""

import runpy
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flax_mlm.config import validate
from flax_mlm.config.knobs import knobs
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
    sections = {}
    for field in fields(Config):
        if field.name not in values:
            raise UserError(f"config has no '{field.name}'; start from configs/base.py")
        value = values.pop(field.name)
        if is_dataclass(field.type):
            names = {f.name for f in fields(field.type)}
            for wrong, verb in ((names - value.keys(), "lacks"), (value.keys() - names, "has an unknown field")):
                if wrong:
                    raise UserError(f"config section '{field.name}' {verb} '{min(wrong)}'; see configs/base.py")
            value = typing.cast(Any, field.type)(**value)
        sections[field.name] = value
    if values:
        raise UserError(f"config has an unknown section '{min(values)}'; see configs/base.py")
    config = Config(**sections)
    validate.check(config)
    parse_phases(config)
    return config


def base() -> dict[str, Any]:
    """The defaults of configs/base.py as nested dicts."""
    return runpy.run_path(str(BASE))["get_config"]().to_dict()


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """The ConfigDict of a config stored as JSON, the inverse of `Config.to_dict`; fields that did not exist when it
    was stored get their default."""
    stored = dict(values)
    for name, default in base().items():
        value = stored.get(name, default)
        stored[name] = default | value if isinstance(default, dict) else value
    config = ConfigDict(stored)
    for path, knob in knobs().items():
        section, _, name = path.rpartition(".")
        if knob.optional and section in config and config[section].get(name) is None:
            config[section][name] = placeholder(knob.type)
    return config


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts into one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
