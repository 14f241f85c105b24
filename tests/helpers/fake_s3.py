"""A stand-in for S3: moto's server, with faults.

    with FakeS3("bucket") as s3:
        subprocess.run([...], env={**os.environ, **s3.env})

It listens on 127.0.0.1 only, and keeps everything in memory.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

# (method, bucket, object or "") -> None, the (status, code) of an error to answer with, or a share of the body to send.
Fault = Callable[[str, str, str], tuple[int, str] | float | None]

_ERROR = (
    "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{0}</Code><Message>a fault of the test, {0}</Message></Error>"
)


class FakeS3:
    """Starts at `with`, and stops at its end.

    Attributes:
      env: The environment variables that point clients to it.
      fault: Asked before every request; None for no faults.
      requests: The (method, bucket, object) that were asked for.
    """

    def __init__(self, *buckets: str):
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.fault: Fault | None = None
        self.requests: list[tuple[str, str, str]] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._names = buckets
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.env = {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                    "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
                    "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}  # fmt: skip

    def __enter__(self) -> "FakeS3":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        for name in self._names:
            self.backend.create_bucket(name, "us-east-1")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for name in self._names:
            for key in [*self.backend.buckets[name].keys]:
                self.remove(name, key)
            self.backend.delete_bucket(name)

    @property
    def backend(self) -> Any:
        from moto.s3.models import s3_backends

        return s3_backends["123456789012"]["aws"]

    def put(self, bucket: str, name: str, content: bytes) -> None:
        """Stores an object."""
        self.backend.put_object(bucket, name, content)

    def content(self, bucket: str, name: str) -> bytes:
        """Content of an object."""
        return self.backend.get_object(bucket, name).value

    def names(self, bucket: str) -> list[str]:
        """The names of the objects, sorted."""
        return sorted(self.backend.buckets[bucket].keys)

    def remove(self, bucket: str, name: str) -> None:
        """Removes an object."""
        self.backend.delete_object(bucket, name)

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        bucket, _, name = unquote(environ["PATH_INFO"]).lstrip("/").partition("/")
        self.requests.append((environ["REQUEST_METHOD"], bucket, name))
        fault = self.fault(*self.requests[-1]) if self.fault else None
        if isinstance(fault, tuple):
            body = _ERROR.format(fault[1]).encode() * (environ["REQUEST_METHOD"] != "HEAD")
            start_response(
                f"{fault[0]} Fault", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            )
            return [body]
        answer = self._app(environ, start_response)
        if fault is None:
            return answer
        body = b"".join(answer)
        return [body[: int(len(body) * fault)]]  # the connection ends early
