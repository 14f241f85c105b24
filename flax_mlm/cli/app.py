"""How every command starts: flags and config in, one line and an exit code out.

Exit codes: 0 done, 1 a failure, 2 the user's mistake (one line, no traceback), 75 stopped by a
preemption after saving (start me again).
"""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from flax_mlm.config.knobs import knob, parse
from flax_mlm.config.load import build
from flax_mlm.config.schema import Config
from flax_mlm.distributed import environment
from flax_mlm.errors import PREEMPTED, Failure, Preempted, UserError
from flax_mlm.hf.folder import is_hf_folder
from flax_mlm.inference.config import apply_folder, read_config

DEFAULT_CONFIG = Path(__file__).parent.parent.parent / "configs" / "quickstart.py"

_OVERRIDE = re.compile(r"--?(no)?config\.([\w.]*)(?:=(.*))?", re.DOTALL)


def run(main: Callable[[Config], int | None], from_checkpoint: bool = False, positional: str = "") -> None:
    """Parses the command line, builds the config, calls `main` and exits with its code.

    The config comes from `--config=FILE.py` (default: the quickstart), or, with `from_checkpoint`, from the
    checkpoint or Hugging Face folder that `--checkpoint` names; either way `--config.section.field=value` overrides
    it. A bare argument is the value of flag `positional`.
    """
    environment.prepare_paths()
    flags.DEFINE_bool("print_config", False, "show the resolved config as JSON and exit")
    try:
        if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(sys.argv):
            _help(from_checkpoint)
        config = _parse(sys.argv, flags.FLAGS, from_checkpoint, positional)
        if flags.FLAGS.print_config:
            print(json.dumps(config.to_dict(), indent=2))
            sys.exit(0)
        environment.prepare(config.train.batch_groups if config.train.reproducible else 0)
        sys.exit(main(config) or 0)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except Failure as e:
        print(f"stopped: {e}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # not after the threads of whatever has failed, which may be stuck, or have more to say
    except Preempted:  # train has said so on its process 0
        sys.exit(PREEMPTED)
    except BrokenPipeError:  # the reader of our output (head, grep -q) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def resolve(arguments: list[str]) -> Config:
    """The config that a command makes of its arguments `--config=FILE.py` and `--config.section.field=value`.

    Raises:
      UserError: as the command would.
    """
    return _parse(["", *arguments], flags.FlagValues())


def config_arguments(argv: list[str]) -> list[str]:
    """Those arguments of a command line that make its config, as `resolve` takes them."""
    found, rest = _take(argv, "--config")
    rest, to_none = _normalise(rest)
    overrides = [argument for argument in rest if _OVERRIDE.fullmatch(argument)]
    named = [] if found is None else [f"--config={found}"]
    return named + overrides + [f"--config.{path}=none" for path in to_none]


def _parse(argv: list[str], values: flags.FlagValues, from_checkpoint: bool = False, positional: str = "") -> Config:
    """Sets the flags, and builds the config."""
    config_dict, argv = _load(argv, from_checkpoint)
    argv, to_none = _normalise(argv)
    config_flags.DEFINE_config_dict("config", config_dict, flag_values=values, sys_argv=argv)
    try:
        leftover = values(argv)[1:]
    except flags.Error as e:
        raise UserError(str(e).splitlines()[0]) from e
    if positional and leftover and not values[positional].present:
        values[positional].value = leftover.pop(0)
    if leftover:
        raise UserError(f"unexpected argument '{leftover[0]}'; options look like --name=value (see --help)")
    for path in to_none:
        config_dict.update_from_flattened_dict({path: None})
    if config_dict.get("init_from") and (not from_checkpoint or is_hf_folder(values.checkpoint)):
        apply_folder(config_dict, {match[2] for match in map(_OVERRIDE.fullmatch, argv) if match}, from_checkpoint)
    return build(config_dict)


def _help(from_checkpoint: bool) -> None:
    """Prints the command's flags and exits."""
    what = "" if from_checkpoint else "a config file, by default configs/quickstart.py. "
    flags.DEFINE_string("config", "", f"{what}--config.section.field=value sets a field; --print_config shows them")
    for name in ("config", "print_config"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    try:
        app.run(lambda _: None)
    except SystemExit:  # absl leaves with 1
        sys.exit(0)


def _load(argv: list[str], from_checkpoint: bool) -> tuple[ConfigDict, list[str]]:
    """The ConfigDict that overrides apply to, and argv without the option that named it."""
    found, rest = _take(argv, "--checkpoint" if from_checkpoint else "--config")
    if from_checkpoint:
        if not found:
            raise UserError("--checkpoint is missing; give the workdir of a run, or one of its checkpoints")
        rest.insert(1, f"--checkpoint={found}")
        return read_config(found), rest
    return _from_file(str(DEFAULT_CONFIG) if found is None else found), rest


def _take(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of one option, if it is there, and the other arguments."""
    found, rest = None, []
    arguments = iter(argv)
    for argument in arguments:
        if argument == name:
            found = next(arguments, "")
        elif argument.startswith(name + "="):
            found = argument.split("=", 1)[1]
        else:
            rest.append(argument)
    return found, rest


def _from_file(path_and_argument: str) -> ConfigDict:
    path, _, argument = path_and_argument.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config: no file '{path}'; try configs/quickstart.py")
    sys.path.insert(0, str(DEFAULT_CONFIG.parent.parent))  # so that a config can say `from configs import base`
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


def _normalise(argv: list[str]) -> tuple[list[str], list[str]]:
    """Checks every `--config.x` override, and rewrites what ml_collections would not take.

    It refuses `1e6` for an int and none for a placeholder, and answers a misspelt name with a traceback.

    Returns:
      The new argv, and the names of the fields that were given `none`.
    """
    result, to_none = list[str](), list[str]()
    arguments = iter(argv)
    for argument in arguments:
        match = _OVERRIDE.fullmatch(argument)
        if not match:
            result.append(argument)
            continue
        negated, path, text = match.groups()
        if text is None and knob(path).type is bool:
            text = "false" if negated else "true"
        elif text is None:
            text = next(arguments, None)
            if text is None:
                raise UserError(f"--config.{path} has no value; write --config.{path}=VALUE")
        to_none = [other for other in to_none if other != path]  # the last one counts
        if (value := parse(path, text)) is None:
            to_none.append(path)
        else:
            result.append(f"--config.{path}={value}")
    return result, to_none
