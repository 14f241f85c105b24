"""Google Cloud Storage: gs:// paths, their errors, and conditional writes.

Files are read and written through etils.epath, which uses gcsfs; tensorstore reads and writes the arrays of
checkpoints. A bucket has no folders, renaming or appending. In return, a written object is visible to all readers at
once and whole, and a write can depend on the generation of the object that it replaces.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

from etils import epath

from flax_mlm.errors import Failure, UserError

AnyPath: TypeAlias = Path | epath.Path  # local, or in a bucket

BUCKET = r"[a-z0-9][a-z0-9._-]+"  # a name of one

_CONNECT_TIMEOUT, _READ_TIMEOUT = 5, 60  # seconds; gcsfs tries six times
# In the clients' messages: temporary errors, and errors of credentials.
_TEMPORARY = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED)\b")
_FORBIDDEN = re.compile(r"^Forbidden|\bPERMISSION_DENIED\b")
_UNAUTHENTICATED = re.compile(r"\bUNAUTHENTICATED\b|Invalid Credentials|Anonymous caller")
_LOGIN = "attach a service account to a Google Cloud machine, elsewhere run `gcloud auth application-default login`"


class Unreachable(Failure):
    """A bucket that does not answer, or answers with a temporary error."""


def parse(what: str, text: str) -> epath.Path | None:
    """Parses a gs:// path. Returns None for a local path.

    Args:
      what: the flag or field that has this value, for error messages.
      text: as the user wrote it.

    Raises:
      UserError: the URL is not a valid gs:// path, or gcsfs is not installed.
    """
    if "://" not in text:
        return None
    if not text.startswith("gs://"):
        raise UserError(f"{what}: '{text}' has another scheme; expected a folder or gs://BUCKET/FOLDER")
    check_name(what, text)
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{what}: '{text}' needs gcsfs; pip install -r launch/gcs-requirements.txt")
    client()
    return epath.Path(text)


def check_name(what: str, text: str, scheme: str = "gs") -> None:
    """Raises UserError unless the URL of a file or folder has a name that all clients take as it is."""
    expected = f"expected {scheme}://BUCKET/FOLDER"
    names = text.removeprefix(f"{scheme}://").rstrip("/").split("/")
    if not re.fullmatch(BUCKET, names[0]) or {"", ".", ".."} & {*names}:
        raise UserError(f"{what}: '{text}' is not a path in a bucket; {expected}")
    if special := re.search(r"[*?\[\]#\x00-\x1f]", text):
        raise UserError(f"{what}: '{text}' contains {special[0]!r}, which clients of buckets interpret; rename it")


def local(what: str, text: str) -> Path:
    """Parses a local path to write to. Raises UserError for a URL."""
    if "://" in text:
        raise UserError(f"{what}: '{text}' cannot be written; name a local file or folder, and copy it")
    return Path(text).expanduser()


def is_one(path: AnyPath) -> bool:
    """True for a path in a bucket."""
    return os.fspath(path).startswith("gs://")


def client() -> Any:
    """The gcsfs client, without a cache of listings and with timeouts; epath uses the same settings."""
    return _client(os.getpid())


@functools.cache
def _client(process: int) -> Any:  # the event loop of a client does not survive a fork
    import aiohttp
    import fsspec

    # These log tracebacks of exceptions that they also raise; asyncio logs open connections at exit.
    for name in ("gcsfs", "fsspec", "google.auth", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    timeout = aiohttp.ClientTimeout(sock_connect=_CONNECT_TIMEOUT, sock_read=_READ_TIMEOUT)
    fsspec.config.conf.setdefault("gcs", {}).update(use_listings_cache=False, requests_timeout=timeout)
    return fsspec.filesystem("gcs")


@contextlib.contextmanager
def errors(path: AnyPath) -> Iterator[None]:
    """Turns the clients' exceptions about a bucket into errors of one line. Others pass, such as FileNotFoundError for
    a missing object.

    Raises:
      UserError: the credentials are missing or insufficient.
      Unreachable: the bucket does not answer.
    """
    try:
        yield
    except Exception as e:
        if is_one(path) and (explained := explain(path, e)):
            raise explained from e
        raise


def explain(path: AnyPath | str, e: Exception) -> UserError | Unreachable | None:
    """The one-line error for an exception of the clients; None if the exception is not about the bucket."""
    import aiohttp
    import fsspec
    import gcsfs.retry
    import google.auth.exceptions
    import requests

    client_errors = (gcsfs.retry.HttpError, aiohttp.ClientError, requests.RequestException, fsspec.FSTimeoutError)
    is_auth = isinstance(e, google.auth.exceptions.GoogleAuthError)
    if not isinstance(e, (*client_errors, OSError, ValueError)) and not is_auth:  # ValueError: tensorstore
        return None
    message, code = " ".join(str(e).split())[:300], str(getattr(e, "code", ""))
    if _FORBIDDEN.search(message):
        return UserError(f"'{path}' cannot be used: these credentials do not allow it ({message})")
    if code == "401" or is_auth or _UNAUTHENTICATED.search(message):
        return UserError(f"'{path}' cannot be used: there are no valid credentials ({message}); {_LOGIN}")
    if isinstance(e, client_errors) or _TEMPORARY.search(message):
        return Unreachable(f"'{path}' cannot be reached ({type(e).__name__}: {message})")
    return None


def check(what: str, path: AnyPath) -> None:
    """Lists a path in a bucket, to find errors early; does nothing for local paths.

    Raises:
      UserError: there is no such bucket, or the credentials are insufficient.
      Unreachable: the bucket does not answer.
    """
    if not is_one(path):
        return
    bucket, name = _split(path)
    try:
        with errors(path):
            client().call("GET", "b/{}/o", bucket, prefix=f"{name}/", maxResults=1)
    except FileNotFoundError:
        raise UserError(f"{what}: there is no bucket '{bucket}'; create it, or correct the name") from None


def read(path: AnyPath) -> tuple[bytes | None, int]:
    """Reads an object and its generation; None and 0 if there is no object."""
    bucket, name = _split(path)
    try:
        with errors(path):
            headers, content = client().call("GET", "b/{}/o/{}", bucket, name, alt="media")
    except FileNotFoundError:
        return None, 0
    return content, int(headers["X-Goog-Generation"])


def write(path: AnyPath, content: bytes | None, generation: int) -> bool:
    """Writes an object, or deletes it where `content` is None, if its current generation is this one.

    Args:
      generation: 0: there is none.

    Returns:
      False if it has changed.
    """
    bucket, name = _split(path)
    condition = {"ifGenerationMatch": str(generation)}
    try:
        with errors(path):
            if content is None:
                with contextlib.suppress(FileNotFoundError):
                    client().call("DELETE", "b/{}/o/{}", bucket, name, **condition)
                return True
            url = client().base.removesuffix("storage/v1/") + f"upload/storage/v1/b/{quote(bucket)}/o"
            client().call("POST", url, data=content, uploadType="media", name=name, **condition)
    except FileExistsError:  # also if the object was written, the response was lost, and gcsfs tried again
        return read(path)[0] == content
    return True


def _split(path: AnyPath) -> tuple[str, str]:
    """The bucket, and the object's name in it."""
    bucket, _, name = os.fspath(path).removeprefix("gs://").partition("/")
    return bucket, name
