"""Exceptions that end a command with one line instead of a traceback, each with an exit code."""

import contextlib
import difflib
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

PREEMPTED = 75  # EX_TEMPFAIL in sysexits.h


class UserError(Exception):
    """A mistake in a flag, a config, a file or a folder.

    Commands print the message as one line and exit with `code`, without a traceback. The message names the field or
    file, the value seen, and what would be right.
    """

    code = 2


class Failure(Exception):
    """A run that cannot continue through no mistake of the user: a lost process, a full disk.

    Commands print the message as one line and exit with `code`: 1, or 2 where a restart would end in the same way.
    """

    code = 1


class Preempted(Exception):
    """A run that a signal has stopped, with its state saved.

    Commands print the message as one line and exit with code 75 (`PREEMPTED`): the same command continues.
    """


@contextlib.contextmanager
def as_user_error(prefix: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions of some kinds into a UserError with this text before their message."""
    try:
        yield
    except kinds as e:
        raise UserError(f"{prefix}{e}") from e


@contextlib.contextmanager
def as_failure(what: str) -> Iterator[None]:
    """Turns an OSError, such as that of a full disk, into a Failure: once mended, the command is started again."""
    try:
        yield
    except OSError as e:
        raise Failure(f"{what}: {e.strerror or e}; mend that, and start the same command again") from e


def refuse_lfs_pointer(file: Any) -> None:
    """Raises UserError where a file, a `Path`, is what Git leaves for a large file that was not downloaded."""
    with file.open("rb") as f:
        if f.read(40).startswith(b"version https://git-lfs.github.com"):
            raise UserError(f"{file} is a Git LFS pointer, not the file itself; run: git lfs pull")


def hub_remedy(path: str) -> str:
    """Returns how to name a model of the Hugging Face Hub where a path looks like one; else nothing."""
    if not re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", path) or re.search(r"\.(json|model|txt)$", path):
        return ""
    return f"if it names a model of the Hub, give hf:{path}"


def did_you_mean(name: str, names: Iterable[str], otherwise: str) -> str:
    """The end of a message about an unknown name: the nearest name, or `otherwise` where none is near."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else otherwise


def json_kind(value: Any) -> str:
    """Names a JSON value, for a message: `null`, `NaN`, `a list of 3`, `an object`."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value).replace("nan", "NaN")
    names = {type(None): "null", dict: "an object", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "a text")
