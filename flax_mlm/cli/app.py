"""Runs a command: flags and a config in, one line of error and an exit code out.

The config comes from `--config=FILE.py` or `--checkpoint=PATH`, and from `--config.section.field=value`.

Exit codes: 0 success, 1 failure, 2 user error (one line, no traceback), 75 stopped by a preemption after saving (run
the same command again).
"""

import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from flax_mlm.config.knobs import knob, parse, spell
from flax_mlm.config.load import build
from flax_mlm.config.schema import Config
from flax_mlm.distributed import environment
from flax_mlm.errors import PREEMPTED, Failure, Preempted, UserError
from flax_mlm.inference.config import apply_folder, read_config
from flax_mlm.storage import gcs

_ROOT = Path(__file__).parents[2]
_OVERRIDE = re.compile(r"--?(no)?config\.([\w.]*)(?:=(.*))?", re.DOTALL)


def run(main: Callable[[Config], int | None], from_checkpoint: bool = False, positional: str = "") -> None:
    """Parses the command line, builds the config, calls `main` and exits with its code.

    Args:
      main: the command; its result is the exit code, None for 0.
      from_checkpoint: the config comes from the checkpoint or Hugging Face folder of `--checkpoint`, otherwise from
        `--config=FILE.py` (default: the quickstart). `--config.section.field=value` overrides either.
      positional: the flag that a bare argument is the value of.
    """
    environment.prepare_paths()
    flags.DEFINE_bool("print_config", False, "print the resolved config as JSON and exit")
    if from_checkpoint:
        source = "a run's workdir (its newest checkpoint), WORKDIR@STEP, a checkpoint, or a Hugging Face folder"
        flags.DEFINE_string("checkpoint", "", source)
    try:
        if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(sys.argv):
            _help(from_checkpoint)
        config = _parse(sys.argv, from_checkpoint, positional)
        if flags.FLAGS.print_config:
            print(json.dumps(config.to_dict(), indent=2))
            sys.exit(0)
        environment.prepare(config.train.batch_groups if config.train.reproducible else 0)
        sys.exit(main(config) or 0)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except Failure as e:
        print(f"stopped: {e}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # a failed thread may be stuck, and must not delay the exit
    except Preempted:  # train has printed the line on process 0
        sys.exit(PREEMPTED)
    except BrokenPipeError:  # the reader of the output (head, grep -q) has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def required(flag: str, hint: str) -> str:
    """Returns the value of a flag. Raises UserError, with a hint of what to give, if it is empty."""
    if not (value := flags.FLAGS[flag].value):
        raise UserError(f"--{flag} is missing; {hint}")
    return value


def required_folder(flag: str, hint: str) -> Path:
    """Returns the value of a flag as a local path. Raises UserError, also for a URL; see `required`."""
    return gcs.local(f"--{flag}", required(flag, hint))


def _parse(argv: list[str], from_checkpoint: bool, positional: str) -> Config:
    """Sets the flags and builds the config. Raises UserError."""
    source, overrides, rest = _split(argv, "--checkpoint" if from_checkpoint else "--config")
    if not from_checkpoint:
        config = config_of(argv)
    elif source:
        config = build(read_config(source, overrides))
        rest.insert(1, f"--checkpoint={source}")
    else:
        raise UserError("--checkpoint is missing; name the workdir of a run, a checkpoint or a Hugging Face folder")
    try:
        bare = flags.FLAGS(rest)[1:]
    except flags.Error as e:
        raise UserError(str(e).splitlines()[0]) from e
    if positional and bare and not flags.FLAGS[positional].present:
        flags.FLAGS[positional].value = bare.pop(0)
    if bare:
        raise UserError(f"unexpected argument '{bare[0]}'; options look like --name=value (see --help)")
    return config


def _help(from_checkpoint: bool) -> None:
    """Prints the command's flags and exits."""
    file = "" if from_checkpoint else "config file, default configs/quickstart.py; "
    flags.DEFINE_string("config", "", f"{file}--config.section.field=value sets a field; --print_config lists them")
    for name in ("config", "print_config", *["checkpoint"] * from_checkpoint):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    try:
        app.run(lambda _: None)
    except SystemExit:  # absl exits with 1
        sys.exit(0)


def _split(argv: list[str], source_flag: str = "--config") -> tuple[str | None, dict[str, Any], list[str]]:
    """Separates what determines the config from the other arguments.

    Returns:
      The value of `source_flag`, the fields and their values, and the other arguments.

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
        elif match := re.fullmatch(f"{source_flag}(?:=(.*))?", argument, re.DOTALL):
            source = next(arguments, "") if match[1] is None else match[1]
        else:
            rest.append(argument)
    return source, overrides, rest


def config_arguments(argv: list[str]) -> list[str]:
    """The arguments of a command line that determine its config; `config_of` builds the same config from them."""
    source, overrides, _ = _split(argv)
    named = [] if source is None else [f"--config={source}"]
    return named + [f"--config.{path}={spell(value)}" for path, value in overrides.items()]


def config_of(arguments: list[str]) -> Config:
    """Builds the config of `--config=FILE.py`, the quickstart's by default, and `--config.section.field=value`.

    Raises:
      UserError: there is no such file or field, or the config is not valid.
    """
    path, overrides, _ = _split(arguments)
    config = _load_file(str(_ROOT / "configs" / "quickstart.py") if path is None else path)
    try:
        config.update_from_flattened_dict(overrides)
    except KeyError as e:  # the file has deleted the section
        raise UserError(f"--config: {e.args[0]} Start the config from configs/base.py") from e
    if config.get("init_from"):
        apply_folder(config, overrides.keys())
    return build(config)


def _load_file(path_and_argument: str) -> ConfigDict:
    """Calls `get_config` of a config file, with the text after a colon as its argument."""
    path, _, argument = path_and_argument.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config: no file '{path}'; try configs/quickstart.py")
    sys.path.insert(0, str(_ROOT))  # lets a config say `from configs import base`
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"--config: {path} has no function get_config; see configs/small.py")
        return get_config(argument) if argument else get_config()
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"--config: {path} cannot be loaded: {type(e).__name__}: {e}") from e
    finally:
        sys.path.pop(0)
