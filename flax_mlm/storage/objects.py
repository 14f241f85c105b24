"""Interface of the services of buckets, so that `buckets` needs to know none of them."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from flax_mlm.errors import UserError
from flax_mlm.storage.gcs import AnyPath, Unreachable

PAGE = 1000  # names in a listing


class Object(NamedTuple):
    """An object: its name in the bucket, its size in bytes, and what changes whenever its content does."""

    name: str
    size: int
    version: str


class Changed(Exception):
    """An object is not, or no longer, there in the version that was asked for."""


class Store(Protocol):
    """A service of buckets. Each method may raise the exceptions of its client, which `explain` explains, and
    FileNotFoundError where there is no such bucket or object.
    """

    def client(self) -> Any:
        """Returns the fsspec file system, without a cache of listings and with timeouts; epath uses the same."""

    def explain(self, path: AnyPath | str, error: Exception) -> UserError | Unreachable | None:
        """Returns the one-line error for an exception; None if the exception is not about the bucket."""

    def stat(self, bucket: str, name: str) -> Object:
        """Asks for an object."""

    def get(self, bucket: str, name: str, start: int, end: int, version: str) -> bytes:
        """Reads the bytes [start, end) of an object. Raises Changed: it has another version."""

    def entries(self, bucket: str, prefix: str, delimiter: str, limit: int) -> Iterator[Object | str]:
        """Lists the objects whose names begin so; of names that go on with the delimiter, the part up to it, once.

        Args:
          limit: so many are enough; 0: all.
        """

    def put(self, bucket: str, name: str, content: bytes | memoryview) -> None:
        """Writes an object, of which readers see all or nothing."""

    def delete(self, bucket: str, name: str) -> None:
        """Deletes an object."""
