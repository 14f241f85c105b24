"""The program `flax-mlm`: `flax-mlm train ...` does the same as `python -m flax_mlm.train ...`."""

import ast
import runpy
import sys
from pathlib import Path

from flax_mlm.cli import output
from flax_mlm.errors import did_you_mean

COMMANDS = (  # in the order in which a user meets them
    *("prepare", "audit", "plan", "train", "sweep", "evaluate", "compare", "embed", "fill_mask", "export"),
    "verify_resume",
)


def main() -> None:
    """Runs the command that the first argument names, or lists the commands."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        runpy.run_module(f"flax_mlm.{name}", run_name="__main__", alter_sys=True)
    elif name in ("--help", "-h"):
        with output.guarded(is_log=False):
            print("usage: flax-mlm COMMAND --name=value ...; `flax-mlm COMMAND --help` lists the options\n")
            for command in COMMANDS:
                source = Path(__file__).with_name(f"{command}.py").read_text()  # an import would define its flags
                print(f"  {command:15}{(ast.get_docstring(ast.parse(source)) or '').splitlines()[0]}")
            code = output.exit_code(0)
        sys.exit(code)
    else:
        hint = did_you_mean(name, COMMANDS, "`flax-mlm --help` lists the commands")
        print(f"error: flax-mlm has no command '{name}'; {hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
