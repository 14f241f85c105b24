"""Errors of a file server that pass: what they stop is tried again, and they are never taken for damage."""

import errno
import functools
import os
import re
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from flax_mlm.errors import Failure

_P = ParamSpec("_P")
_R = TypeVar("_R")

_NAMES = ("ESTALE", "EIO", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EREMOTEIO")
_CODES = {getattr(errno, name) for name in _NAMES if hasattr(errno, name)}
_STATED = re.compile(r"\bos(?:_error_code='| error )(\d+)")  # by tensorstore, and by libraries in Rust
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # seconds, half a minute in all


def is_transient(error: BaseException | None) -> bool:
    """Returns whether an exception, or one that it was raised from, is about a file server and not about a file."""
    while error:
        codes = [error.errno] if isinstance(error, OSError) else map(int, _STATED.findall(str(error)))
        if _CODES.intersection(codes):
            return True
        error = error.__cause__
    return False


def retrying(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes a function that reads try again for half a minute while a file server fails, and then raise Failure."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for pause in (*_PAUSES, None):
            try:
                return function(*args, **kwargs)
            except Failure:
                raise
            except Exception as e:
                if not is_transient(e):
                    raise
                if pause is None:
                    raise Failure(describe(e)) from e
            time.sleep(pause)
        raise AssertionError

    return call


def reason(error: BaseException) -> str:
    """Returns the message of an exception in one line, first what a library cites from the system."""
    text = " ".join(str(error).split())
    if codes := _STATED.findall(text):
        return f"{os.strerror(int(codes[-1]))}: {re.sub('^[A-Z_]+: ', '', text)[:200]}"
    return f"{type(error).__name__}: {text[:300]}"


def describe(error: BaseException) -> str:
    """Returns the line that a command ends with: the error of the file server, without what was made of it."""
    while error.__cause__ and is_transient(error.__cause__):
        error = error.__cause__
    return f"a file server does not answer: {reason(error)}; nothing is changed, start again"
