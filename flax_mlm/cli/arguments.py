"""The config of a command line: `--config=FILE.py` or `--checkpoint=PATH`, and `--config.section.field=value`."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from flax_mlm.cli.grid import spell
from flax_mlm.config.knobs import knob, parse
from flax_mlm.config.load import build
from flax_mlm.config.schema import Config
from flax_mlm.errors import UserError
from flax_mlm.hf.folder import is_hf_folder
from flax_mlm.inference.config import apply_folder, read_config

_ROOT = Path(__file__).parents[2]
_OVERRIDE = re.compile(r"--?(no)?config\.([\w.]*)(?:=(.*))?", re.DOTALL)


class Arguments(NamedTuple):
    """A command line."""

    source: str | None  # value of --config or --checkpoint
    overrides: dict[str, Any]  # field -> value
    rest: list[str]


def split(argv: list[str], source_flag: str = "--config") -> Arguments:
    """Separates what determines the config from the other arguments.

    Raises:
      UserError: an override names no field, or its value is not of the field's type.
    """
    source, overrides, rest = None, dict[str, Any](), list[str]()
    arguments = iter(argv)
    for argument in arguments:
        if match := _OVERRIDE.fullmatch(argument):
            negated, path, text = match.groups()
            if text is None and knob(path).type is bool:
                text = "false" if negated else "true"
            elif text is None and (text := next(arguments, None)) is None:
                raise UserError(f"--config.{path} has no value; write --config.{path}=VALUE")
            overrides[path] = parse(path, text)
        elif argument == source_flag:
            source = next(arguments, "")
        elif argument.startswith(f"{source_flag}="):
            source = argument.removeprefix(f"{source_flag}=")
        else:
            rest.append(argument)
    return Arguments(source, overrides, rest)


def config_arguments(argv: list[str]) -> list[str]:
    """The arguments of a command line that determine its config; `config_of` builds the same config from them."""
    source, overrides, _ = split(argv)
    named = [] if source is None else [f"--config={source}"]
    return named + [f"--config.{path}={spell(value)}" for path, value in overrides.items()]


def config_of(arguments: list[str]) -> Config:
    """Builds the config that a command makes from `--config=FILE.py` and `--config.section.field=value`.

    Raises:
      UserError: as the command does.
    """
    source, overrides, _ = split(arguments)
    return config_from_file(source, overrides)


def config_from_file(path: str | None, overrides: dict[str, Any]) -> Config:
    """Builds the config of a config file, the quickstart's by default. Raises UserError."""
    config = _load_file(str(_ROOT / "configs" / "quickstart.py") if path is None else path)
    try:
        config.update_from_flattened_dict(overrides)
    except KeyError as e:  # the file has deleted the section
        raise UserError(f"--config: {e.args[0]} Start the config from configs/base.py") from e
    if config.get("init_from"):
        apply_folder(config, overrides.keys())
    return build(config)


def config_from_checkpoint(path: str, overrides: dict[str, Any]) -> Config:
    """Builds the config of a checkpoint or a Hugging Face folder. Raises UserError."""
    config = read_config(path)
    config.update_from_flattened_dict(overrides)
    if is_hf_folder(path):
        apply_folder(config, overrides.keys(), as_is=True)
    return build(config)


def _load_file(path_and_argument: str) -> ConfigDict:
    """Calls `get_config` of a config file, with the text after a colon as its argument."""
    path, _, argument = path_and_argument.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config: no file '{path}'; try configs/quickstart.py")
    sys.path.insert(0, str(_ROOT))  # lets a config say `from configs import base`
    try:
        spec = importlib.util.spec_from_file_location("_config_file", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"--config: {path} cannot be loaded: {type(e).__name__}: {e}") from e
    finally:
        sys.path.pop(0)
