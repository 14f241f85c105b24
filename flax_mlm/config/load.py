"""Builds checked configs from ConfigDicts and from stored JSON."""

import typing
from dataclasses import fields, is_dataclass
from typing import Any

from ml_collections import ConfigDict

from flax_mlm.config import validate
from flax_mlm.config.knobs import knob, knobs
from flax_mlm.config.phases import parse_phases
from flax_mlm.config.schema import Config
from flax_mlm.configs import base
from flax_mlm.errors import UserError


def build(config_dict: ConfigDict) -> Config:
    """Turns a resolved ConfigDict into a checked `Config`.

    Raises:
      UserError: a field is missing or unknown, or has a value that is not allowed.
    """
    values = config_dict.to_dict()
    names = flatten(values).keys()
    if missing := knobs().keys() - names:
        raise UserError(f"config has no field '{min(missing)}'; start from flax_mlm.configs.base")
    for name in sorted(names - knobs().keys()):
        knob(name)  # raises
    for section in fields(Config):
        if is_dataclass(section.type):
            values[section.name] = typing.cast(Any, section.type)(**values[section.name])
    config = Config(**values)
    validate.check(config)
    parse_phases(config)
    return config


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """The ConfigDict of a config stored as JSON, the inverse of `Config.to_dict`; fields that did not exist when it
    was stored get their default."""
    config = base.get_config()
    with config.unlocked(), config.ignore_type():
        config.update(values)
    return config


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts into one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
