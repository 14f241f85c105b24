"""Runs a command: flags and a config in, one line of error and an exit code out.

The config comes from `--config` (a packaged config or a file) or `--checkpoint`, and `--config.section.field=value`.

Exit codes: 0 success, 1 failure, 2 user error (one line, no traceback), 75 stopped by a preemption after saving (run
the same command again).
"""

import contextlib
import datetime
import functools
import json
import os
import re
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from flax_mlm.cli import output
from flax_mlm.config.knobs import knob, parse, spell
from flax_mlm.config.load import build
from flax_mlm.config.schema import Config
from flax_mlm.config.validate import check_complete
from flax_mlm.configs import base
from flax_mlm.distributed import compilation_cache, environment
from flax_mlm.errors import PREEMPTED, Failure, Preempted, UserError, did_you_mean
from flax_mlm.inference.config import apply_folder, pin_hub_names, read_config
from flax_mlm.storage import gcs, retry

_CONFIGS = {file.stem: file for file in sorted(Path(base.__file__).parent.glob("*.py"))}
_KEPT = f"keep compiled programs for later starts, in {compilation_cache.FOLDER} or JAX_COMPILATION_CACHE_DIR"
_KEEPS_COMPILED = flags.DEFINE_bool("compilation_cache", True, _KEPT)
_HELP = {"--help", "-help", "-h", "--helpfull", "--helpshort"}
_OVERRIDE = re.compile(r"--?(no)?config\.([\w.]*)(?:=(.*))?", re.DOTALL)


def run(
    main: Callable[[Config], int | None],
    from_checkpoint: bool = False,
    positional: str = "",
    prints_log: bool = False,
    passes_arguments: bool = False,
) -> None:
    """Parses the command line, builds the config, calls `main` and exits with its code.

    Args:
      main: the command; its result is the exit code, None for 0.
      from_checkpoint: the config comes from the checkpoint or Hugging Face folder of `--checkpoint`, otherwise from
        `--config` (see `config_of`). `--config.section.field=value` overrides either.
      positional: the flag that a bare argument is the value of.
      passes_arguments: the command takes what follows `--`, see `arguments_after_dashes`.
      prints_log: what the command makes is in files, and it succeeds although stdout cannot be written; otherwise it
        exits with 1 then.
    """
    prints_log = prints_log and not {*_HELP, "--print_config"} & set(sys.argv)
    with output.guarded(prints_log):
        code = _run(main, from_checkpoint, positional, passes_arguments)
        code = code if prints_log else output.exit_code(code)
    sys.exit(code)


def _run(main: Callable[[Config], int | None], from_checkpoint: bool, positional: str, passes_arguments: bool) -> int:
    environment.prepare_paths()
    flags.DEFINE_bool("print_config", False, "print the resolved config as JSON and exit", module_name=sys.argv[0])
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["compilation_cache"])
    if from_checkpoint:
        source = (
            "a run's workdir (its newest checkpoint), WORKDIR@STEP, a checkpoint, a Hugging Face folder, or hf:ORG/NAME"
        )
        flags.DEFINE_string("checkpoint", "", source, module_name=sys.argv[0])
    try:
        argv = sys.argv[: len(sys.argv) - len(arguments_after_dashes())] if passes_arguments else sys.argv
        if _HELP & set(argv):
            return _help(from_checkpoint)
        config = _parse(argv, from_checkpoint, positional)
        if flags.FLAGS.print_config:
            print(json.dumps(config.to_dict(), indent=2))
            return 0
        check_complete(config)
        environment.prepare(config.train.batch_groups if config.train.reproducible else 0)
        compilation_cache.keep(_KEEPS_COMPILED.value)
        with output.Status(functools.partial(_elapsed, time.monotonic())):
            return main(config) or 0
    except UserError as e:
        passes = retry.is_transient(e)  # the error of a file server, and no mistake
        line = f"stopped: {retry.describe(e)}" if passes else f"error: {e}"
        print(line.replace("\n", "\\n"), file=sys.stderr)  # as in the name of a file
        return 1 if passes else 2
    except ValueError as e:
        if not traceback.extract_tb(e.__traceback__)[-1].filename.endswith("jax/_src/config.py"):
            raise
        print(f"error: JAX cannot be imported: {e}; correct or unset its variable, JAX_...", file=sys.stderr)
        return 2
    except Failure as e:
        print(f"stopped: {e}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(e.code)  # a failed thread may be stuck, and must not delay the exit
    except Preempted:  # train has printed the line on process 0
        return PREEMPTED
    except OSError as e:
        if not retry.is_transient(e):
            raise
        print(f"stopped: {retry.describe(e)}", file=sys.stderr)
        return 1


def _elapsed(start: float, columns: int) -> str:
    """The status line of a command that has none of its own."""
    return f"{Path(sys.argv[0]).stem} {datetime.timedelta(seconds=int(time.monotonic() - start))}"


def arguments_after_dashes() -> list[str]:
    """Returns what follows `--` on the command line, which is for another program."""
    return sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []


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
        raise UserError(
            "--checkpoint is missing; name the workdir of a run, a checkpoint, a Hugging Face folder or hf:ORG/NAME"
        )
    try:
        bare = flags.FLAGS(rest)[1:]
    except flags.Error as e:
        raise UserError(str(e).splitlines()[0]) from e
    if positional and bare and not flags.FLAGS[positional].present:
        flags.FLAGS[positional].value = bare.pop(0)
    if bare:
        raise UserError(f"unexpected argument '{bare[0]}'; options look like --name=value (see --help)")
    return config


def _help(from_checkpoint: bool) -> int:
    """Prints the command's flags. Returns the exit code."""
    default = "quickstart, or continue_pretraining with init_from"
    source = "" if from_checkpoint else f"{', '.join(_CONFIGS)}, or a file; default: {default}; "
    meaning = f"{source}--config.section.field=value sets a field; --print_config lists them"
    flags.DEFINE_string("config", "", meaning, module_name=sys.argv[0])
    with contextlib.suppress(SystemExit):  # absl exits with 1
        app.run(lambda _: None)
    return 0


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
    """Builds the config of `--config`, by default quickstart (with `init_from` continue_pretraining), and of
    `--config.section.field=value`.

    Raises:
      UserError: there is no such config or field, or the config is not valid.
    """
    source, overrides, _ = _split(arguments)
    default = "continue_pretraining" if overrides.get("init_from") else "quickstart"
    config = _load(default if source is None else source)
    try:
        config.update_from_flattened_dict(overrides)
    except KeyError as e:  # the file has deleted the section
        raise UserError(f"--config: {e.args[0]} Start the config from flax_mlm.configs.base") from e
    if config.get("init_from"):
        apply_folder(config, overrides.keys())
    elif config.get("tokenizer"):
        pin_hub_names(config)
    return build(config)


def _load(name_and_argument: str) -> ConfigDict:
    """Calls `get_config` of a packaged config or of a file, with the text after a colon as its argument."""
    is_file = Path(name_and_argument).is_file()  # whose name may have a colon
    name, _, argument = (name_and_argument, "", "") if is_file else name_and_argument.partition(":")
    file = _CONFIGS.get(name, Path(name))
    if not file.is_file():
        hint = did_you_mean(file.stem, _CONFIGS, f"the configs are {', '.join(_CONFIGS)}")
        raise UserError(f"--config is '{name}'; expected a file or a config of flax_mlm; {hint}")
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
        config = get_config and (get_config(argument) if argument else get_config())
    except Exception as e:
        remedy = "; write `from flax_mlm.configs import ...`" * (isinstance(e, ImportError) and e.name == "configs")
        raise UserError(f"--config: {name} cannot be loaded: {type(e).__name__}: {e}{remedy}") from e
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: {name} has no function get_config that returns a ConfigDict; define one")
    return config
