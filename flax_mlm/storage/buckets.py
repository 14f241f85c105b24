"""Objects in buckets: gs:// (Cloud Storage), s3:// (S3) and az:// (Azure Blob Storage).

Sources and corpora are read and written through this file. Workdirs and checkpoints lie in folders or on gs://, see
`gcs`, whose conditional writes they need.

A bucket has no folders: a folder is what the names of some objects begin with. An object is written whole, and a reader
sees all of it or nothing.
"""

import concurrent.futures
import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import tenacity
from etils import epath

from flax_mlm.errors import UserError, as_user_error
from flax_mlm.storage import gcs
from flax_mlm.storage.azure import AzureStore
from flax_mlm.storage.gcs import AnyPath, Unreachable
from flax_mlm.storage.gcs_objects import GcsStore
from flax_mlm.storage.objects import Changed, Object, Store
from flax_mlm.storage.s3 import S3Store

_T = TypeVar("_T")
_R = TypeVar("_R")
_F = TypeVar("_F", bound=Callable[..., Any])

_STORES: dict[str, Store] = {"gs": GcsStore(), "s3": S3Store(), "az": AzureStore()}
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3"), "az": ("adlfs", "az")}  # and the name of its requirements
_OTHER_NAMES = {"s3a": "s3", "s3n": "s3", "abfs": "az", "abfss": "az", "wasb": "az", "wasbs": "az", "gcs": "gs"}
_EXPECTED = "expected a local path, or gs://, s3:// or az://BUCKET/PATH"
_MAX_REQUESTS = 32  # at the same time
_PATIENCE = 20  # seconds after which a request that failed is not sent again; the clients have tried several times then


class Found(NamedTuple):
    """An object that a pattern has found.

    Attributes:
      version: changes whenever the content does: the generation on gs://, else the ETag.
    """

    url: str
    size: int
    version: str


def is_url(what: str, text: str) -> bool:
    """Returns whether a path is in a bucket.

    Args:
      what: the flag or field that has this value, for the error message.

    Raises:
      UserError: it has another scheme.
    """
    scheme, is_scheme, rest = text.partition("://")
    if is_scheme and scheme not in _STORES:
        known = _OTHER_NAMES.get(scheme)
        remedy = f"write it as {known}://{rest}" if known and "@" not in rest else _EXPECTED
        if known and "@" in rest:  # abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH
            container, _, path = rest.partition("@")
            remedy = f"write it as az://{container}/{path.partition('/')[2]}, with AZURE_STORAGE_ACCOUNT_NAME set"
        raise UserError(f"{what}: '{text}' has the scheme {scheme}://; {remedy}")
    return bool(is_scheme)


def is_one(path: AnyPath | str) -> bool:
    """Returns whether a path that was parsed is in a bucket."""
    return os.fspath(path).partition("://")[0] in _STORES and "://" in os.fspath(path)


def parse(what: str, text: str) -> epath.Path | None:
    """Parses the URL of a file or folder in a bucket. Returns None for a local path.

    Raises:
      UserError: it is not a URL of a bucket, or the package that reads it is not installed.
    """
    if not is_url(what, text):
        return None
    gcs.check_name(what, text, text.partition("://")[0])
    require_package(what, text)
    return epath.Path(text)


def require_package(what: str, text: str) -> None:
    """Sets up the client for a URL. Raises UserError: its package is not installed, or its settings are wrong."""
    package, extra = _PACKAGES[text.partition("://")[0]]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what}: '{text}' needs {package}; pip install -r launch/{extra}-requirements.txt")
    with errors(text):
        _store(text).client()


@contextlib.contextmanager
def errors(path: AnyPath | str) -> Iterator[None]:
    """Turns the clients' exceptions about a bucket into errors of one line; FileNotFoundError passes.

    Raises:
      UserError: the credentials are missing or insufficient, or the server refuses a request.
      Unreachable: the bucket does not answer.
    """
    try:
        yield
    except (UserError, Unreachable):
        raise
    except Exception as e:
        if is_one(path) and (explained := _store(path).explain(path, e)):
            raise explained from e
        if is_one(path) and isinstance(e, OSError) and not isinstance(e, FileNotFoundError):
            message = " ".join(str(e).split())[:300]
            raise UserError(f"'{path}' cannot be used ({type(e).__name__}: {message})") from e
        raise


def check(what: str, path: AnyPath | str) -> None:
    """Lists a path in a bucket, to find errors early; does nothing for local paths.

    Raises:
      UserError: there is no such bucket, or the credentials are insufficient.
      Unreachable: the bucket does not answer.
    """
    if is_one(path):
        _, bucket, name = _split(path)
        with in_bucket(what, path):
            entries(path, bucket, name and name.rstrip("/") + "/", "", 1)


def check_writable(what: str, folder: AnyPath | str) -> None:
    """Writes and deletes an object in a folder. Raises UserError, with the flag or field `what`."""
    check(what, folder)
    probe = f"{os.fspath(folder).rstrip('/')}/.written-by-flax_mlm-to-see-if-it-can"
    with as_user_error(f"{what}: ", UserError):
        put(probe, b"")
        delete(probe)


def together(function: Callable[[_T], _R], items: Sequence[_T], where: AnyPath | str) -> list[_R]:
    """Maps a function over items: in parallel if `where`, the path they are in, is in a bucket."""
    if len(items) < 2 or not is_one(where):
        return [function(item) for item in items]
    with concurrent.futures.ThreadPoolExecutor(_MAX_REQUESTS) as pool:
        return list(pool.map(function, items))


def _patient(function: _F) -> _F:
    """Makes a function of a path try again for a while where its bucket does not answer, and explain its errors."""

    def explained(path: AnyPath | str, *arguments: Any) -> Any:
        with errors(path):
            return function(path, *arguments)

    decorated: Any = tenacity.retry(
        retry=tenacity.retry_if_exception_type(Unreachable),
        wait=tenacity.wait_exponential(multiplier=0.25, max=8),
        stop=lambda state: (state.seconds_since_start or 0) >= _PATIENCE,
        reraise=True,
    )(explained)
    return decorated


@_patient
def stat(path: AnyPath | str) -> Found | None:
    """Asks for an object; None if there is none, also if there is a folder of this name."""
    store, bucket, name = _split(path)
    try:
        found = store.stat(bucket, name) if name and not name.endswith("/") else None
    except FileNotFoundError:
        return None
    return Found(os.fspath(path), found.size, found.version) if found else None


def read(path: AnyPath | str) -> bytes:
    """Reads an object. Raises FileNotFoundError: there is none."""
    found = stat(path)
    if found is None:
        raise FileNotFoundError(f"there is no object '{path}'")
    return get(path, found, 0, found.size) if found.size else b""


@_patient
def read_ranges(path: AnyPath | str, starts: list[int], lengths: list[int]) -> list[bytes]:
    """Reads ranges of an object, each by a request of its own, many at a time."""
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    return _store(path).client().cat_ranges([os.fspath(path)] * len(starts), starts, ends, on_error="raise")


@_patient
def put(path: AnyPath | str, content: bytes | memoryview) -> None:
    """Writes an object, of which readers see all or nothing."""
    store, bucket, name = _split(path)
    try:
        store.put(bucket, name, content)
    except FileNotFoundError as e:
        raise UserError(f"'{path}' cannot be written: there is no bucket '{bucket}'") from e


@_patient
def delete(path: AnyPath | str) -> None:
    """Deletes an object, if it is there."""
    store, bucket, name = _split(path)
    with contextlib.suppress(FileNotFoundError):
        store.delete(bucket, name)


def names(folder: AnyPath | str) -> list[str]:
    """Lists the names of the objects directly in a folder, sorted."""
    _, bucket, name = _split(folder)
    prefix = name and name.rstrip("/") + "/"
    with in_bucket(f"'{folder}'", folder):
        found = [e for e in entries(folder, bucket, prefix, "/", 0) if isinstance(e, Object)]
    return sorted(e.name.removeprefix(prefix) for e in found if not e.name.endswith("/"))


def delete_folder(folder: AnyPath | str) -> None:
    """Deletes all objects in a folder and in those under it."""
    scheme, (_, bucket, name) = os.fspath(folder).partition("://")[0], _split(folder)
    prefix = name and name.rstrip("/") + "/"
    with in_bucket(f"'{folder}'", folder):
        found = [e.name for e in entries(folder, bucket, prefix, "", 0) if isinstance(e, Object)]
    together(delete, [f"{scheme}://{bucket}/{one}" for one in found], folder)


def is_folder(path: AnyPath | str) -> bool:
    """Returns whether there are objects in a folder of this name."""
    _, bucket, name = _split(path)
    try:
        return bool(entries(path, bucket, name and name.rstrip("/") + "/", "", 1))
    except FileNotFoundError:  # the bucket
        return False


@_patient
def get(path: AnyPath | str, found: Found, start: int, end: int) -> bytes:
    """Reads the bytes [start, end) of an object that was found. Raises UserError: it has changed since."""
    store, bucket, name = _split(path)
    try:
        content = store.get(bucket, name, start, end, found.version)
    except Changed as e:
        raise changed(path) from e
    if len(content) != end - start:
        raise Unreachable(f"'{path}' cannot be read: {end - start} bytes were asked for, and {len(content)} came")
    return content


def changed(path: AnyPath | str) -> UserError:
    """Makes the error for an object that is not any more what it was."""
    return UserError(f"'{path}' was changed or deleted while it was read; start again when nothing writes to it")


@_patient
def entries(path: AnyPath | str, bucket: str, prefix: str, delimiter: str, limit: int) -> list[Object | str]:
    """Lists objects and folders, see `objects.Store.entries`."""
    return list(_store(path).entries(bucket, prefix, delimiter, limit))


@contextlib.contextmanager
def in_bucket(what: str, path: AnyPath | str) -> Iterator[None]:
    """Names the flag or field in errors about a bucket that is not there."""
    try:
        with errors(path):
            yield
    except FileNotFoundError:
        _, bucket, _ = _split(path)
        raise UserError(f"{what}: there is no bucket '{bucket}'; create it, or correct the name") from None


def _store(path: AnyPath | str) -> Store:
    return _STORES[os.fspath(path).partition("://")[0]]


def _split(path: AnyPath | str) -> tuple[Store, str, str]:
    """The service, the bucket, and the object's name in it."""
    bucket, _, name = os.fspath(path).partition("://")[2].partition("/")
    return _store(path), bucket, name
