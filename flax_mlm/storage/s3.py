"""S3, of Amazon or of any server that speaks its protocol: requests and errors, through s3fs.

Credentials, region and endpoint are those of the usual AWS environment and files (AWS_ACCESS_KEY_ID, AWS_PROFILE,
AWS_REGION, AWS_ENDPOINT_URL, ...).
"""

import errno
import functools
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from flax_mlm.errors import UserError
from flax_mlm.storage import objects
from flax_mlm.storage.gcs import AnyPath, Unreachable
from flax_mlm.storage.objects import Changed, Object

_CONNECT_TIMEOUT, _READ_TIMEOUT = 5, 30  # seconds
_ATTEMPTS = 5  # with up to 1, 2, 4 and 8 s between them
_MAX_CONNECTIONS = 64
_LOGIN = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or attach a role to the machine"
_REGION = "set AWS_REGION to that of the bucket"
_UNAUTHENTICATED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidSecurity"}
_UNAUTHENTICATED |= {"TokenRefreshRequired", "RequestTimeTooSkewed", "InvalidClientTokenId"}
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_TEMPORARY = {errno.EBUSY, errno.EIO, getattr(errno, "EREMOTEIO", errno.EIO)}  # what s3fs makes of 5xx
_OF_CREDENTIALS = re.compile("Credential|Token|SSO|Profile|Login")  # in the names of botocore's exceptions


@functools.cache
def _client(process: int) -> Any:  # the event loop of a client does not survive a fork
    import fsspec
    import s3fs

    for name in ("s3fs", "fsspec", "botocore", "aiobotocore", "asyncio"):  # which log what they also raise
        logging.getLogger(name).setLevel(logging.CRITICAL)

    class S3(s3fs.S3FileSystem):
        retries = 1  # those of botocore are enough: together they would be 25, which take minutes

    fsspec.register_implementation("s3", S3, clobber=True)
    config: dict[str, Any] = {"connect_timeout": _CONNECT_TIMEOUT, "read_timeout": _READ_TIMEOUT}
    config |= {"retries": {"mode": "standard", "total_max_attempts": _ATTEMPTS}}
    config |= {"max_pool_connections": _MAX_CONNECTIONS}
    fsspec.config.conf.setdefault("s3", {}).update(use_listings_cache=False, config_kwargs=config)
    return fsspec.filesystem("s3")


class S3Store:
    """S3, see `objects.Store`."""

    def client(self) -> Any:
        return _client(os.getpid())

    def explain(self, path: AnyPath | str, error: Exception) -> UserError | Unreachable | None:
        import aiohttp
        import botocore.exceptions as boto
        import fsspec

        message, code = " ".join(str(error).split())[:300], _code(error)
        if isinstance(error, boto.BotoCoreError) and _OF_CREDENTIALS.search(type(error).__name__):
            return UserError(f"'{path}' cannot be used: there are no valid credentials ({message}); {_LOGIN}")
        if code in _UNAUTHENTICATED:
            return UserError(f"'{path}' cannot be used: its server refuses these credentials ({message}); {_LOGIN}")
        if code in _ELSEWHERE:
            return UserError(f"'{path}' cannot be used: it is in another region ({message}); {_REGION}")
        if isinstance(error, PermissionError):
            return UserError(f"'{path}' cannot be used: these credentials do not allow it ({message})")
        if isinstance(error, boto.ParamValidationError):
            return UserError(f"'{path}' cannot be used ({message})")
        if isinstance(error, (ValueError, boto.InvalidRegionError)) and not isinstance(error, UnicodeError):
            return UserError(f"'{path}' cannot be used ({message}); check AWS_ENDPOINT_URL and AWS_REGION")
        temporary = (boto.BotoCoreError, aiohttp.ClientError, fsspec.FSTimeoutError, TimeoutError, ConnectionError)
        if isinstance(error, temporary) or (isinstance(error, OSError) and error.errno in _TEMPORARY):
            return Unreachable(f"'{path}' cannot be reached ({type(error).__name__}: {message})")
        return None

    def stat(self, bucket: str, name: str) -> Object:
        try:
            found = self.client().call_s3("head_object", Bucket=bucket, Key=name)
        except FileNotFoundError:
            raise
        except OSError:
            next(self.entries(bucket, name, "", 1), None)  # its answer says why; that to HEAD has no text
            raise
        return Object(name, found["ContentLength"], found["ETag"].strip('"'))

    def get(self, bucket: str, name: str, start: int, end: int, version: str) -> bytes:
        import fsspec.asyn

        client = self.client()
        options = {"Range": f"bytes={start}-{end - 1}", "IfMatch": f'"{version}"'}

        async def read() -> bytes:
            answer = await client._call_s3("get_object", Bucket=bucket, Key=name, **options)
            async with answer["Body"] as body:
                return await body.read()

        try:
            return fsspec.asyn.sync(client.loop, read)
        except FileNotFoundError as e:
            raise Changed from e
        except OSError as e:
            if _code(e) in ("PreconditionFailed", "412"):
                raise Changed from e
            raise

    def entries(self, bucket: str, prefix: str, delimiter: str, limit: int) -> Iterator[Object | str]:
        options = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter, "MaxKeys": limit or objects.PAGE}
        while True:
            page = self.client().call_s3("list_objects_v2", **options)
            for found in page.get("Contents", []):
                yield Object(found["Key"], found["Size"], found["ETag"].strip('"'))
            for folder in page.get("CommonPrefixes", []):
                yield folder["Prefix"]
            if limit or not page.get("IsTruncated"):
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def put(self, bucket: str, name: str, content: bytes | memoryview) -> None:
        self.client().call_s3("put_object", Bucket=bucket, Key=name, Body=bytes(content))

    def delete(self, bucket: str, name: str) -> None:
        self.client().call_s3("delete_object", Bucket=bucket, Key=name)


def _code(error: BaseException | None) -> str:
    """The server's error code, from an exception or one that it was raised from; "" where there is none."""
    while error:
        if response := getattr(error, "response", None):
            return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
        error = error.__cause__
    return ""
