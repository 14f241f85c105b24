"""Azure Blob Storage: requests and errors, through adlfs and the Azure SDK.

The account and its credentials are those of the environment: AZURE_STORAGE_CONNECTION_STRING, or
AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, a service principal, a managed
identity, or `az login`.
"""

import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

from flax_mlm.errors import UserError
from flax_mlm.storage import objects
from flax_mlm.storage.gcs import AnyPath, Unreachable
from flax_mlm.storage.objects import Changed, Object

_CONNECT_TIMEOUT, _READ_TIMEOUT = 5, 30  # seconds
_RETRIES = {"retry_total": 4, "initial_backoff": 1, "increment_base": 2, "random_jitter_range": 1}  # 1, 3, 5, 9 s
_ACCOUNT = "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
_LOGIN = f"{_ACCOUNT}, or run `az login`"


@functools.cache
def _client(process: int) -> Any:  # the event loop of a client does not survive a fork
    import adlfs
    import fsspec
    from azure.storage.blob.aio import BlobServiceClient

    for name in ("adlfs", "fsspec", "azure", "asyncio"):  # which log what they also raise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"connection_timeout": _CONNECT_TIMEOUT, "read_timeout": _READ_TIMEOUT, **_RETRIES}

    class Azure(adlfs.AzureBlobFileSystem):
        def do_connect(self) -> None:
            super().do_connect()  # its client waits for minutes
            if self.connection_string:
                self.service_client = BlobServiceClient.from_connection_string(self.connection_string, **options)
            else:
                sas = (self.sas_token or "") if not (self.credential or self.account_key) else ""
                credential = self.credential or self.account_key
                self.service_client = BlobServiceClient(self.account_url + sas, credential, **options)

    fsspec.register_implementation("az", Azure, clobber=True)
    for protocol in Azure.protocol:
        fsspec.config.conf.setdefault(protocol, {}).update(use_listings_cache=False)
    return fsspec.filesystem("az")


class AzureStore:
    """Azure Blob Storage, see `objects.Store`. A bucket is a container there, and an object a blob."""

    def client(self) -> Any:
        return _client(os.getpid())

    def explain(self, path: AnyPath | str, error: Exception) -> UserError | Unreachable | None:
        import fsspec
        from azure.core import exceptions as azure

        status = getattr(error, "status_code", None) or 0
        message = " ".join(str(error).split())[:300]
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):  # adlfs, of the environment
            return UserError(f"'{path}' cannot be used ({message}); {_ACCOUNT}")
        if status == 403 and getattr(error, "error_code", "") != "AuthenticationFailed":
            return UserError(f"'{path}' cannot be used: these credentials do not allow it ({message})")
        if isinstance(error, azure.ClientAuthenticationError) or status in (401, 403):
            return UserError(f"'{path}' cannot be used: there are no valid credentials ({message}); {_LOGIN}")
        sent = (azure.ServiceRequestError, azure.ServiceResponseError, azure.IncompleteReadError)
        if (
            isinstance(error, (*sent, fsspec.FSTimeoutError, TimeoutError, ConnectionError))
            or status >= 500
            or status in (408, 429)
        ):
            return Unreachable(f"'{path}' cannot be reached ({type(error).__name__}: {message})")
        if isinstance(error, azure.AzureError):
            return UserError(f"'{path}' cannot be used ({type(error).__name__}: {message})")
        return None

    def stat(self, bucket: str, name: str) -> Object:
        found = self._do(lambda service: service.get_blob_client(bucket, name).get_blob_properties())
        return Object(name, found["size"], found["etag"].strip('"'))

    def get(self, bucket: str, name: str, start: int, end: int, version: str) -> bytes:
        from azure.core import MatchConditions
        from azure.core.exceptions import ResourceModifiedError

        condition = {"etag": f'"{version}"', "match_condition": MatchConditions.IfNotModified}

        async def read(service: Any) -> bytes:
            blob = service.get_blob_client(bucket, name)
            return await (await blob.download_blob(start, end - start, **condition)).readall()

        try:
            return self._do(read)
        except (FileNotFoundError, ResourceModifiedError) as e:
            raise Changed from e

    def entries(self, bucket: str, prefix: str, delimiter: str, limit: int) -> Iterator[Object | str]:
        from azure.storage.blob.aio import BlobPrefix

        options: dict[str, Any] = {"name_starts_with": prefix, "include": ["metadata"]}
        options |= {"results_per_page": limit or objects.PAGE}
        options |= {"delimiter": delimiter} if delimiter else {}

        async def page(service: Any) -> tuple[list[Any], str | None]:
            container = service.get_container_client(bucket)
            pages = (container.walk_blobs if delimiter else container.list_blobs)(**options).by_page(token)
            async for one in pages:
                return [item async for item in one], pages.continuation_token
            return [], None

        token = None
        while True:
            items, token = self._do(page)
            for item in items:
                if isinstance(item, BlobPrefix):
                    yield item.name
                elif (item.metadata or {}).get("hdi_isfolder") != "true":  # in accounts with folders
                    yield Object(item.name, item.size, item.etag.strip('"'))
            if limit or not token:
                return

    def put(self, bucket: str, name: str, content: bytes | memoryview) -> None:
        data = bytes(content)
        self._do(lambda service: service.get_blob_client(bucket, name).upload_blob(data, overwrite=True))

    def delete(self, bucket: str, name: str) -> None:
        self._do(lambda service: service.get_blob_client(bucket, name).delete_blob())

    def _do(self, request: Any) -> Any:
        import fsspec.asyn
        from azure.core.exceptions import ResourceNotFoundError

        client = self.client()

        async def done() -> Any:
            return await request(client.service_client)

        try:
            return fsspec.asyn.sync(client.loop, done)
        except ResourceNotFoundError as e:
            raise FileNotFoundError(" ".join(str(e).split())[:300]) from e
