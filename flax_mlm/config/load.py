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
    names = flatten(values).keys()
    if missing := knobs().keys() - names:
        raise UserError(f"config has no field '{min(missing)}'; start from configs/base.py")
    if unknown := names - knobs().keys():
        raise UserError(f"config has an unknown field '{min(unknown)}'; see configs/base.py")
    for section in fields(Config):
        if is_dataclass(section.type):
            values[section.name] = typing.cast(Any, section.type)(**values[section.name])
    config = Config(**values)
    validate.check(config)
    parse_phases(config)
    return config


def base() -> dict[str, Any]:
    """The defaults of configs/base.py as nested dicts."""
    return runpy.run_path(str(BASE))["get_config"]().to_dict()


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """The ConfigDict of a config stored as JSON, the inverse of `Config.to_dict`; fields that did not exist when it
    was stored get their default."""
    merged = dict(values)
    for name, default in base().items():
        merged[name] = default | values.get(name, {}) if isinstance(default, dict) else values.get(name, default)
    config = ConfigDict(merged)
    for path, knob in knobs().items():
        section, _, name = path.rpartition(".")
        if knob.optional and config[section][name] is None:
            config[section][name] = placeholder(knob.type)
    return config


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts into one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
