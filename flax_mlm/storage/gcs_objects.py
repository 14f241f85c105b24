"""Cloud Storage as one of several kinds of buckets, see `objects.Store`; its client and errors are those of `gcs`."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from flax_mlm.errors import UserError
from flax_mlm.storage import gcs, objects
from flax_mlm.storage.objects import Changed, Object


class GcsStore:
    """Cloud Storage, see `objects.Store`."""

    def client(self) -> Any:
        return gcs.client()

    def explain(self, path: gcs.AnyPath | str, error: Exception) -> UserError | gcs.Unreachable | None:
        return gcs.explain(path, error)

    def stat(self, bucket: str, name: str) -> Object:
        return _object(gcs.client().call("GET", "b/{}/o/{}", bucket, name, json_out=True))

    def get(self, bucket: str, name: str, start: int, end: int, version: str) -> bytes:
        headers = {"Range": f"bytes={start}-{end - 1}"}
        options = {"alt": "media", "ifGenerationMatch": version}
        try:
            return gcs.client().call("GET", "b/{}/o/{}", bucket, name, headers=headers, **options)[1]
        except (FileNotFoundError, FileExistsError) as e:  # as gcsfs names a condition that does not hold
            raise Changed from e

    def entries(self, bucket: str, prefix: str, delimiter: str, limit: int) -> Iterator[Object | str]:
        options: dict[str, Any] = {"prefix": prefix, "maxResults": limit or objects.PAGE}
        options |= {"delimiter": delimiter} if delimiter else {}
        while True:
            page = gcs.client().call("GET", "b/{}/o", bucket, json_out=True, **options)
            yield from map(_object, page.get("items", []))
            yield from page.get("prefixes", [])
            if limit or not page.get("nextPageToken"):
                return
            options["pageToken"] = page["nextPageToken"]

    def put(self, bucket: str, name: str, content: bytes | memoryview) -> None:
        url = gcs.client().base.removesuffix("storage/v1/") + f"upload/storage/v1/b/{quote(bucket)}/o"
        gcs.client().call("POST", url, data=bytes(content), uploadType="media", name=name)

    def delete(self, bucket: str, name: str) -> None:
        gcs.client().call("DELETE", "b/{}/o/{}", bucket, name)


def _object(found: dict[str, Any]) -> Object:
    return Object(found["name"], int(found["size"]), str(found["generation"]))
