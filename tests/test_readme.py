"""README is true: its layout is the tree, its commands exist and parse."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_layout_is_the_tree():
    block = re.search(r"## Layout\n\n```\n(.*?)```", README, re.DOTALL)[1]
    named = {line.split()[0] for line in block.splitlines() if line.startswith("  ")}
    package = ROOT / "flax_mlm"
    files = {p.name for p in package.glob("*.py") if p.name != "__init__.py"}
    folders = {f"{p.parent.name}/" for p in package.glob("*/__init__.py")}
    assert named == files | folders
    for line in block.splitlines():
        if not line.startswith(" "):
            assert (ROOT / line.split()[0]).is_dir()


def test_every_config_is_named():
    named = set(re.findall(r"\(configs/(\w+\.py)\)", README))
    assert named == {p.name for p in (ROOT / "configs").glob("*.py")}


COMMANDS = sorted(set(re.findall(r"python -m flax_mlm\.(\w+)", README)))


def test_every_command_is_named():
    runnable = {p.stem for p in (ROOT / "flax_mlm").glob("*.py") if re.search(r"\bapp\.run\(", p.read_text())}
    assert set(COMMANDS) == runnable


def options() -> list[tuple[str, str]]:
    """Each option of each command line in README and in the configs' docstrings, with its command."""
    texts = [README, *(p.read_text() for p in (ROOT / "configs").glob("*.py"))]
    lines = re.findall(r"python -m flax_mlm\.(\w+)((?:[^\n`\\]|\\\n)*)", "\n".join(texts))
    return sorted({(command, o) for command, rest in lines for o in re.findall(r"--([\w.]+)", rest)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_in_the_examples_exists(command):
    from flax_mlm.config.knobs import knobs

    line = [sys.executable, "-m", f"flax_mlm.{command}", "--help"]
    text = subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for _, option in (o for o in options() if o[0] == command):
        if option.startswith("config."):
            assert option.removeprefix("config.") in knobs(), option
        else:
            assert re.search(rf"--(\[no\])?{option}\b", text), option
