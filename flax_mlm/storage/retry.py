"""Errors of a file server that pass: what they stop is tried again, and they are never taken for damage."""

import errno
import os
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import tenacity

from flax_mlm.errors import Failure

_F = TypeVar("_F", bound=Callable[..., Any])
_NAMES = ("ESTALE", "EIO", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EREMOTEIO")
_CODES = {getattr(errno, name) for name in _NAMES if hasattr(errno, name)}
_STATED = re.compile(r"\bos(?:_error_code='| error )(\d+)")  # by tensorstore, and by libraries in Rust


def is_transient(error: BaseException | None) -> bool:
    """Returns whether an exception, or one that it was raised from, is about a file server and not about a file."""
    while error:
        codes = [error.errno] if isinstance(error, OSError) else map(int, _STATED.findall(str(error)))
        if _CODES.intersection(codes):
            return True
        error = error.__cause__
    return False


def retrying(function: _F) -> _F:
    """Makes a function that reads try again for half a minute while a file server fails, and then raise Failure."""
    decorated: Any = tenacity.retry(
        retry=tenacity.retry_if_exception(lambda e: not isinstance(e, Failure) and is_transient(e)),
        wait=tenacity.wait_exponential(multiplier=0.5, max=15),
        stop=tenacity.stop_after_attempt(7),
        retry_error_callback=_give_up,
    )(function)
    return decorated


def _give_up(state: tenacity.RetryCallState) -> NoReturn:
    assert state.outcome
    error = state.outcome.exception()
    assert error
    raise Failure(describe(error)) from error


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
