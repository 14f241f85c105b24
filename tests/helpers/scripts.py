"""What scripts find around them: programs, and a virtual environment."""

import stat
import subprocess
import sys
from pathlib import Path

from tests.helpers.fork_server import python_program
from tests.helpers.paths import ROOT


def tool(name: str) -> Path:
    """A program that comes in a package, beside this interpreter."""
    return Path(sys.executable).with_name(name)


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def environment_with_everything(folder: Path, *requirements: str) -> Path:
    """A virtual environment, for launch/setup.sh, that is this one."""
    executable(folder / "bin" / "python", python_program())
    for name in ("requirements.txt", *requirements):
        check = subprocess.run(["cksum"], input=(ROOT / name).read_bytes(), capture_output=True).stdout.decode()
        (folder / f"installed-{check.strip().replace(' ', '-')}").touch()
    return folder
