"""Cloud Storage: paths that begin with gs://, what can go wrong with them, and changes that ask for a generation.

Files are read and written through etils.epath and, under it, gcsfs; the arrays of checkpoints by tensorstore.
A bucket has no folders, no renaming and no appending, but what is written is seen by all at once, whole, and may be
made to depend on what was there before.
"""

import concurrent.futures
import contextlib
import functools
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote

from etils import epath

from flax_mlm.errors import Failure, UserError

AnyPath: TypeAlias = Path | epath.Path  # of a folder, or in a bucket

_T = TypeVar("_T")
_R = TypeVar("_R")

_CONNECT, _SILENCE = 5, 60  # seconds until a server that does not answer is asked again, six times in all
_AT_ONCE = 32  # requests
# What the clients say: of what may be over in a while, and of credentials.
_PASSING = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED)\b")
_FORBIDDEN = re.compile(r"^Forbidden|\bPERMISSION_DENIED\b")
_UNKNOWN = re.compile(r"\bUNAUTHENTICATED\b|Invalid Credentials|Anonymous caller")


class Unreachable(Failure):
    """A bucket does not answer, or not as it should."""


def parse(what: str, text: str) -> epath.Path | None:
    """The path in a bucket that `text` names; None where it names none, but a file or folder of this machine.

    Args:
      what: the flag or field that it is the value of.
      text: as the user wrote it.

    Raises:
      UserError: it is not such a path, or gcsfs is not installed.
    """
    if "://" not in text:
        return None
    if not text.startswith("gs://"):
        raise UserError(f"{what}: '{text}' cannot be used; it can be a folder, or gs://BUCKET/FOLDER")
    names = text.removeprefix("gs://").rstrip("/").split("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+", names[0]) or {"", ".", ".."} & {*names}:
        raise UserError(f"{what}: '{text}' is not a path in a bucket; it looks like gs://BUCKET/FOLDER")
    if found := re.search(r"[*?\[\]#\x00-\x1f]", text):
        raise UserError(f"{what}: '{text}' has {found[0]!r} in it, which means other things to Cloud Storage's clients")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{what}: '{text}' needs gcsfs; pip install -r launch/gcs-requirements.txt")
    client()
    return epath.Path(text)


def refuse(what: str, text: str) -> None:
    """Raises UserError where `text` names no folder or file of this machine, for what is written to those alone."""
    if "://" in text:
        raise UserError(f"{what}: '{text}' cannot be written; name a folder or file here, and copy it there")


def is_one(path: AnyPath) -> bool:
    """Whether a path is one in a bucket."""
    return os.fspath(path).startswith("gs://")


@functools.cache
def client() -> Any:
    """gcsfs, set so that what others write is seen, and that it gives up in the end; epath has the same settings."""
    import aiohttp
    import fsspec

    # They log tracebacks of what they also raise; and aiohttp has its say about connections when we leave at once.
    for name in ("gcsfs", "fsspec", "google.auth", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    timeout = aiohttp.ClientTimeout(sock_connect=_CONNECT, sock_read=_SILENCE)
    settings = {"use_listings_cache": False, "requests_timeout": timeout}
    fsspec.config.conf.setdefault("gcs", {}).update(settings)
    return fsspec.filesystem("gcs")


@contextlib.contextmanager
def errors(path: AnyPath) -> Iterator[None]:
    """Around what is done with a path: says in one line what is wrong with its bucket. A missing object stays a
    FileNotFoundError, and what has nothing to do with buckets is raised as it is.

    Raises:
      UserError: the credentials are missing or not good enough.
      Unreachable: it does not answer.
    """
    try:
        yield
    except Exception as e:
        if is_one(path) and (explained := explain(path, e)):
            raise explained from e
        raise


def explain(path: AnyPath, e: Exception) -> UserError | Unreachable | None:
    """What an exception of the clients means for a path in a bucket; None where it is about something else."""
    import aiohttp
    import fsspec
    import gcsfs.retry
    import google.auth.exceptions
    import requests

    theirs = (gcsfs.retry.HttpError, aiohttp.ClientError, requests.RequestException, fsspec.FSTimeoutError)
    is_auth = isinstance(e, google.auth.exceptions.GoogleAuthError)
    if not isinstance(e, (*theirs, OSError, ValueError)) and not is_auth:  # tensorstore has ValueError for everything
        return None
    said, code = " ".join(str(e).split())[:300], str(getattr(e, "code", ""))
    if _FORBIDDEN.search(said):
        return UserError(f"'{path}' cannot be used: these credentials do not allow it ({said})")
    if code == "401" or is_auth or _UNKNOWN.search(said):
        return UserError(
            f"'{path}' cannot be used: there are no valid credentials ({said}); on a machine of Google's it needs a "
            "service account, elsewhere `gcloud auth application-default login`"
        )
    if isinstance(e, theirs) or _PASSING.search(said):
        return Unreachable(f"'{path}' cannot be reached ({type(e).__name__}: {said})")
    return None


def check(what: str, path: AnyPath) -> None:
    """Asks for a path in a bucket, so that what is wrong with it is known at once. Others pass.

    Raises:
      UserError: there is no such bucket, or the credentials are not good enough.
      Unreachable: it does not answer.
    """
    if not is_one(path):
        return
    bucket, name = _split(path)
    try:
        with errors(path):
            client().call("GET", "b/{}/o", bucket, prefix=f"{name}/", maxResults=1)
    except FileNotFoundError:
        raise UserError(f"{what}: there is no bucket '{bucket}'; make it, or correct the name") from None


def together(function: Callable[[_T], _R], items: Sequence[_T], where: AnyPath) -> list[_R]:
    """`function` of each of the items, which lie at `where`: at the same time if that is in a bucket."""
    if len(items) < 2 or not is_one(where):
        return [function(item) for item in items]
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, items))


def read(path: AnyPath) -> tuple[bytes, int] | None:
    """An object and its generation; None where there is none."""
    bucket, name = _split(path)
    try:
        with errors(path):
            headers, content = client().call("GET", "b/{}/o/{}", bucket, name, alt="media")
    except FileNotFoundError:
        return None
    return content, int(headers["X-Goog-Generation"])


def write(path: AnyPath, content: bytes, generation: int) -> bool:
    """Writes an object in the place of that generation (0: of none). False where there is another by now."""
    bucket, name = _split(path)
    url = client().base.removesuffix("storage/v1/") + f"upload/storage/v1/b/{quote(bucket)}/o"
    asked = {"uploadType": "media", "name": name, "ifGenerationMatch": str(generation)}
    try:
        with errors(path):
            client().call("POST", url, data=content, **asked)
    except FileExistsError:  # or it was written, the answer lost, and the same asked for again
        return (found := read(path)) is not None and found[0] == content
    return True


def delete(path: AnyPath, generation: int) -> None:
    """Deletes that generation of an object, if it is still there."""
    bucket, name = _split(path)
    with errors(path), contextlib.suppress(FileNotFoundError, FileExistsError):
        client().call("DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=str(generation))


def _split(path: AnyPath) -> tuple[str, str]:
    """Bucket, and name in it."""
    bucket, _, name = os.fspath(path).removeprefix("gs://").partition("/")
    return bucket, name
