"""One interface to the stand-ins for Cloud Storage, S3 and Azure Blob Storage, for tests of what holds for all."""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flax_mlm.storage import azure, buckets, gcs, s3
from tests.helpers.fake_gcs import FakeGcs
from tests.helpers.fake_s3 import FakeS3

SCHEMES = ("gs", "s3", "az")
_CODES = {400: "InvalidBucketName", 401: "InvalidAccessKeyId", 403: "AccessDenied", 503: "SlowDown"}
# That of Azurite and of every other emulator of Azure, published with them.
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class Server:
    """A bucket called `bucket` on a server.

    Attributes:
      url: that of the bucket.
      env: the environment variables that point clients to the server.
    """

    def __init__(self, scheme: str, env: dict[str, str], fake: Any):
        self.scheme, self.url, self.env, self._fake = scheme, f"{scheme}://bucket", env, fake

    def put(self, name: str, content: bytes) -> str:
        """Stores an object; returns its URL."""
        buckets.put(f"{self.url}/{name}", content)
        return f"{self.url}/{name}"

    def put_folder(self, folder: Path, name: str) -> str:
        """Copies a folder; returns its URL."""
        for file in folder.iterdir():
            self.put(f"{name}/{file.name}", file.read_bytes())
        return f"{self.url}/{name}"

    def fail(self, status: int, when: Callable[[str, str], bool] = lambda method, name: True) -> None:
        """Lets requests for which `when(method, name)` holds fail with an HTTP status."""
        if self.scheme == "az":
            pytest.skip("Azurite makes no errors when asked to")
        fault = status if self.scheme == "gs" else (403 if status == 401 else status, _CODES[status])
        self._fake.fault = lambda method, bucket, name: fault if when(method, name) else None

    def set_fault(self, fault: Any) -> None:
        """Answers every request with a fault as the stand-in takes it; None: with none."""
        self._fake.fault = (lambda *request: fault) if fault else None

    def mend(self) -> None:
        """Ends the failures."""
        if self._fake:
            self._fake.fault = None


def forget_clients() -> None:
    """Lets the next request make new clients, for other servers."""
    from etils.epath import backend
    from fsspec.asyn import AsyncFileSystem

    for module in (gcs, s3, azure):
        module._client.cache_clear()
    kinds = [AsyncFileSystem]
    for kind in kinds:
        kind.clear_instance_cache()
        kinds += kind.__subclasses__()
    backend.fsspec_backend._get_filesystem.cache_clear()


@contextlib.contextmanager
def serving(scheme: str) -> Iterator[Server]:
    """Starts a server with a bucket called `bucket`, and points the clients of this process to it."""
    with contextlib.ExitStack() as stack:
        fake: Any = None
        if scheme == "gs":
            fake = stack.enter_context(FakeGcs("bucket"))
        elif scheme == "s3":
            pytest.importorskip("moto")
            pytest.importorskip("s3fs")
            fake = stack.enter_context(FakeS3("bucket"))
        env = fake.env if fake else stack.enter_context(_azurite())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in env.items():
            patch.setenv(name, value)
        forget_clients()
        stack.callback(forget_clients)
        server = Server(scheme, env, fake)
        if scheme == "az":
            buckets.parse("test", server.url)
            buckets._STORES["az"].client().mkdir("bucket")
        yield server


@contextlib.contextmanager
def _azurite() -> Iterator[dict[str, str]]:
    pytest.importorskip("adlfs")
    if not (program := shutil.which("azurite-blob")):
        pytest.skip("azurite-blob, Azure's emulator, is not installed (npm install -g azurite)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([program, "--blobPort", str(port), *options], cwd=folder, stdout=subprocess.DEVNULL)
        try:
            for _ in range(300):
                assert process.poll() is None
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            url = f"http://127.0.0.1:{port}/devstoreaccount1"
            parts = ["DefaultEndpointsProtocol=http", "AccountName=devstoreaccount1", f"AccountKey={_KEY}"]
            yield {"AZURE_STORAGE_CONNECTION_STRING": ";".join([*parts, f"BlobEndpoint={url}", ""])}
        finally:
            process.terminate()
            process.wait()
