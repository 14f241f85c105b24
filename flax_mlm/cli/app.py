"""Runs a command: flags and a config in, one line of error and an exit code out.

Exit codes: 0 success, 1 failure, 2 user error (one line, no traceback), 75 stopped by a preemption after saving (run
the same command again).
"""

import json
import os
import sys
from collections.abc import Callable

from absl import app, flags

from flax_mlm.cli import arguments
from flax_mlm.config.schema import Config
from flax_mlm.distributed import environment
from flax_mlm.errors import PREEMPTED, Failure, Preempted, UserError


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
        print(f"stopped: {e}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # a failed thread may be stuck, and must not delay the exit
    except Preempted:  # train has printed the line on process 0
        sys.exit(PREEMPTED)
    except BrokenPipeError:  # the reader of the output (head, grep -q) has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _parse(argv: list[str], from_checkpoint: bool, positional: str) -> Config:
    """Sets the flags and builds the config. Raises UserError."""
    source, overrides, rest = arguments.split(argv, "--checkpoint" if from_checkpoint else "--config")
    if from_checkpoint:
        if not source:
            raise UserError("--checkpoint is missing; name the workdir of a run, a checkpoint or a Hugging Face folder")
        config = arguments.config_from_checkpoint(source, overrides)
        rest.insert(1, f"--checkpoint={source}")
    else:
        config = arguments.config_from_file(source, overrides)
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
    for name in ("config", "print_config"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    try:
        app.run(lambda _: None)
    except SystemExit:  # absl exits with 1
        sys.exit(0)
