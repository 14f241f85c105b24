"""A stand-in for Cloud Storage: its JSON API, as far as gcsfs, tensorstore and `gcloud storage` use it.

    with FakeGcs("bucket") as gcs:
        subprocess.run([...], env={**os.environ, **gcs.env})
        gcs.buckets["bucket"]["runs/x/config.json"].content

It listens on 127.0.0.1 only, keeps everything in memory, and is strongly consistent as the real one is: every change
has a generation, a request may ask for one (ifGenerationMatch), and is answered with 412 where it comes too late.
"""

import base64
import contextlib
import datetime
import hashlib
import itertools
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import google_crc32c

_BOUNDARY = "batch_of_answers"


class Object(NamedTuple):
    """What is stored under a name."""

    content: bytes
    generation: int
    about: dict[str, Any]  # what the client says of it: contentType, metadata, ...


class _Upload(NamedTuple):
    """A resumable upload that has begun."""

    name: str
    about: dict[str, Any]
    query: dict[str, str]
    received: bytearray


class _Answer(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}


class _Error(Exception):
    """Ends a request with this status."""

    def __init__(self, status: int, message: str = ""):
        super().__init__(message or responses[status])
        self.status = status


# (method, bucket, object or "") -> an HTTP status to answer with, seconds (a float) to wait first, or None.
Fault = Callable[[str, str, str], int | float | None]


class FakeGcs:
    """Starts at `with`, and stops at its end.

    Attributes:
      env: The environment variables that point gcsfs, tensorstore and gcloud to it.
      buckets: Bucket -> name -> Object. Use `put` and `remove` to change what is there from a test.
      fault: Asked before every request; None for no faults.
      requests: How often each (method, bucket, object) was asked for.
      page_size: How many names a listing has at most before it goes on with the next page.
    """

    def __init__(self, *buckets: str):
        self.buckets: dict[str, dict[str, Object]] = {name: {} for name in buckets}
        self.fault: Fault | None = None
        self.requests: dict[tuple[str, str, str], int] = {}
        self.page_size = 1000
        self._lock = threading.RLock()
        self._generations = itertools.count(int(time.time() * 1e6))
        self._uploads: dict[str, _Upload] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"gcs": self}))
        self._server.daemon_threads = True
        self._folder = tempfile.TemporaryDirectory(prefix="gcloud")
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.env = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "NO_GCE_CHECK": "true",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{self.url}/storage/v1/",
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_CONFIG": self._folder.name,
            "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "true",
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
            "CLOUDSDK_CORE_PROJECT": "p",
        }

    def __enter__(self) -> "FakeGcs":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()

    def put(self, bucket: str, name: str, content: bytes, about: dict[str, Any] | None = None) -> Object:
        """Stores an object, with a new generation."""
        about = {"timeCreated": datetime.datetime.now(datetime.UTC).isoformat()[:-6] + "Z", **(about or {})}
        with self._lock:
            self.buckets[bucket][name] = Object(bytes(content), next(self._generations), about)
            return self.buckets[bucket][name]

    def remove(self, bucket: str, prefix: str) -> None:
        """Removes all objects whose names begin so."""
        with self._lock:
            for name in [n for n in self.buckets[bucket] if n.startswith(prefix)]:
                del self.buckets[bucket][name]

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """The names of the objects that begin so, sorted."""
        with self._lock:
            return sorted(n for n in self.buckets[bucket] if n.startswith(prefix))

    def answer(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> _Answer:
        """EvalOutput a request."""
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        path = re.sub(r"^/(resumable/)?(upload/|download/)?(storage/v1/)?", "", parts.path)
        if path.startswith("batch"):
            return self._batch(headers, body)
        match = re.fullmatch(r"b(?:/([^/]+)(?:/(o|iam|storageLayout)(?:/(.*?))?)?)?", path)
        if not match:
            return _error(404, f"no such method: {method} {parts.path}")
        bucket, kind, rest = match[1] or "", match[2] or "", match[3] or ""
        name, _, verb = rest.partition("/")
        is_upload = "/upload/" in parts.path and "uploadType" in query
        name = self._name(query, headers, body) if is_upload else unquote(name)
        with self._lock:
            self.requests[method, bucket, name] = self.requests.get((method, bucket, name), 0) + 1
        fault = self.fault(method, bucket, name) if self.fault else None
        if isinstance(fault, float):
            time.sleep(fault)
        elif fault is not None:
            return _error(fault, f"a fault of the test, {fault}")
        try:
            with self._lock:
                if not bucket or (not kind and method in ("GET", "DELETE")):
                    return self._bucket(method, bucket, body)
                if bucket not in self.buckets:
                    raise _Error(404, "The specified bucket does not exist.")
                if kind == "storageLayout":
                    return _json({"kind": "storage#storageLayout", "bucket": bucket, "location": "US"})
                if kind == "iam":
                    return _json({"permissions": [v for k, v in parse_qsl(parts.query) if k == "permissions"]})
                if is_upload:
                    return self._upload(method, bucket, name, query, headers, body)
                if not rest:
                    return self._list(bucket, query)
                if verb:
                    return self._combine(bucket, name, verb, query, json.loads(body or b"{}"))
                return self._object(method, bucket, name, query, headers, body)
        except _Error as e:
            return _error(e.status, str(e)) if e.status != 304 else _Answer(304)

    def _bucket(self, method: str, bucket: str, body: bytes) -> _Answer:
        if method == "POST":
            bucket = json.loads(body)["name"]
            if bucket in self.buckets:
                raise _Error(409, "Your previous request to create the named bucket succeeded and you already own it.")
            self.buckets[bucket] = {}
        elif not bucket:
            return _json({"kind": "storage#buckets", "items": [_about_bucket(b) for b in self.buckets]})
        if bucket not in self.buckets:
            raise _Error(404, "The specified bucket does not exist.")
        if method == "DELETE":
            if self.buckets[bucket]:
                raise _Error(409, "The bucket you tried to delete is not empty.")
            del self.buckets[bucket]
            return _Answer(204)
        return _json(_about_bucket(bucket))

    def _list(self, bucket: str, query: dict[str, str]) -> _Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        found: dict[str, bool] = {}  # name -> whether it is a prefix
        for name in sorted(self.buckets[bucket]):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if query.get("endOffset") and name >= query["endOffset"]:
                continue
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            found[prefix + head + cut if cut else name] = bool(cut)
        names = [name for name in sorted(found) if name > query.get("pageToken", "")]
        page = names[: min(int(query.get("maxResults") or self.page_size), self.page_size)]
        result: dict[str, Any] = {"kind": "storage#objects"}
        result["items"] = [_about(bucket, n, self.buckets[bucket][n]) for n in page if not found[n]]
        result["prefixes"] = [n for n in page if found[n]]
        if len(page) < len(names):
            result["nextPageToken"] = page[-1]
        return _json({key: value for key, value in result.items() if value})

    def _object(
        self, method: str, bucket: str, name: str, query: dict[str, str], headers: Mapping[str, str], body: bytes
    ) -> _Answer:
        held = self._held(bucket, name, query.get("generation"))
        self._check(held, query, is_read=method == "GET")
        if method == "DELETE":
            del self.buckets[bucket][name]
            return _Answer(204)
        if method in ("PATCH", "PUT"):
            held = held._replace(about={**held.about, **json.loads(body or b"{}")})
            self.buckets[bucket][name] = held
        if query.get("alt") != "media":
            return _json(_about(bucket, name, held))
        about = {
            "Content-Type": held.about.get("contentType", "application/octet-stream"),
            "ETag": f'"{held.generation}"',
            "x-goog-generation": str(held.generation),
            "x-goog-metageneration": "1",
            "x-goog-stored-content-length": str(len(held.content)),
            "x-goog-hash": f"crc32c={_crc32c(held.content)},md5={_md5(held.content)}",
        }
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range", ""))
        if not wanted:
            return _Answer(200, held.content, about)
        size = len(held.content)
        first = int(wanted[1]) if wanted[1] else max(size - int(wanted[2]), 0)
        last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
        if first >= size or last < first:
            raise _Error(416, "The requested range cannot be satisfied: range not satisfiable.")
        content_range = {"Content-Range": f"bytes {first}-{last}/{size}"}
        return _Answer(206, held.content[first : last + 1], {**about, **content_range})

    def _name(self, query: dict[str, str], headers: Mapping[str, str], body: bytes) -> str:
        """What an upload is to be called."""
        if "upload_id" in query:
            return self._uploads[query["upload_id"]].name if query["upload_id"] in self._uploads else ""
        if query["uploadType"] == "multipart":
            body = _parts(headers["Content-Type"], body)[0][1]
        elif query["uploadType"] == "media":
            body = b""
        return json.loads(body or b"{}").get("name") or query["name"]

    def _upload(
        self, method: str, bucket: str, name: str, query: dict[str, str], headers: Mapping[str, str], body: bytes
    ) -> _Answer:
        kind = query["uploadType"]
        if kind == "media":
            return self._store(bucket, name, body, {"contentType": headers.get("Content-Type")}, query)
        if kind == "multipart":
            (_, about), (head, content) = _parts(headers["Content-Type"], body)
            return self._store(
                bucket, name, content, {"contentType": _header(head, "content-type"), **json.loads(about)}, query
            )
        if "upload_id" not in query:
            self._check(self.buckets[bucket].get(name), query)
            key = f"upload{next(self._generations)}"
            self._uploads[key] = _Upload(name, json.loads(body or b"{}"), query, bytearray())
            where = f"{self.url}/upload/storage/v1/b/{quote(bucket)}/o?uploadType=resumable&upload_id={key}"
            return _Answer(200, b"", {"Location": where, "X-GUploader-UploadID": key})
        if query["upload_id"] not in self._uploads:
            raise _Error(410)
        upload = self._uploads[query["upload_id"]]
        if method == "DELETE":
            del self._uploads[query["upload_id"]]
            return _Answer(499)
        span = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", headers.get("Content-Range", ""))
        if span and span[1]:
            del upload.received[int(span[1]) :]
        upload.received.extend(body)
        size = len(upload.received)
        if span and (span[3] == "*" or size < int(span[3])):
            return _Answer(308, b"", {"Range": f"bytes=0-{size - 1}"} if size else {})
        del self._uploads[query["upload_id"]]
        return self._store(bucket, name, bytes(upload.received), upload.about, upload.query)

    def _combine(self, bucket: str, name: str, verb: str, query: dict[str, str], asked: dict[str, Any]) -> _Answer:
        """Objects made of others: compose, copy, rewrite and move."""
        if verb == "compose":
            content = b""
            for source in asked["sourceObjects"]:
                generation = source.get("objectPreconditions", {}).get("ifGenerationMatch", source.get("generation"))
                content += self._held(bucket, source["name"], generation).content
            return self._store(bucket, name, content, asked.get("destination", {}), query)
        match = re.fullmatch(r"(?:(?:rewriteTo|copyTo)/b/([^/]+)/o|moveTo/o)/(.+)", verb)
        if not match:
            raise _Error(404, f"no such method: {verb}")
        held = self._held(bucket, name, query.get("sourceGeneration"))
        self._check(held, {"ifGenerationMatch": query.get("ifSourceGenerationMatch", str(held.generation))})
        to, new_name = unquote(match[1] or bucket), unquote(match[2])
        if to not in self.buckets:
            raise _Error(404, "The specified bucket does not exist.")
        stored = self._store(to, new_name, held.content, {**held.about, **asked}, query)
        if verb.startswith("moveTo"):
            del self.buckets[bucket][name]
        if not verb.startswith("rewriteTo"):
            return stored
        size = str(len(held.content))
        about = {"kind": "storage#rewriteResponse", "done": True, "objectSize": size, "totalBytesRewritten": size}
        return _json({**about, "resource": json.loads(stored.body)})

    def _store(self, bucket: str, name: str, content: bytes, about: dict[str, Any], query: dict[str, str]) -> _Answer:
        self._check(self.buckets[bucket].get(name), query)
        for key, found in (("md5Hash", _md5(content)), ("crc32c", _crc32c(content))):
            if about.get(key) not in (None, found):
                raise _Error(400, f"Provided {key} does not match {found}.")
        kept = {k: v for k, v in about.items() if k in ("contentType", "metadata", "cacheControl", "contentEncoding")}
        return _json(_about(bucket, name, self.put(bucket, name, content, kept)))

    def _held(self, bucket: str, name: str, generation: object = None) -> Object:
        held = self.buckets[bucket].get(name)
        if held is None or (generation is not None and int(str(generation)) != held.generation):
            raise _Error(404, f"No such object: {bucket}/{name}")
        return held

    def _check(self, held: Object | None, query: dict[str, str], is_read: bool = False) -> None:
        generation = held.generation if held else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            raise _Error(412, "At least one of the pre-conditions you specified did not hold.")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            raise _Error(304 if is_read else 412)

    def _batch(self, headers: Mapping[str, str], body: bytes) -> _Answer:
        answers = []
        for head, request in _parts(headers["Content-Type"], body):
            line, *rest = request.replace(b"\r\n", b"\n").decode().split("\n")
            method, url, _ = line.split(" ")
            content = "\n".join(rest).partition("\n\n")[2].encode()
            answer = self.answer(method, url, {}, content)
            identity = re.sub(r"^<?(.*?)>?$", r"<response-\1>", _header(head, "content-id"))
            answers.append(
                f"--{_BOUNDARY}\r\nContent-Type: application/http\r\nContent-ID: {identity}\r\n\r\n"
                f"HTTP/1.1 {answer.status} {responses[answer.status]}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(answer.body)}\r\n\r\n{answer.body.decode()}\r\n"
            )
        whole = "".join(answers) + f"--{_BOUNDARY}--\r\n"
        return _Answer(200, whole.encode(), {"Content-Type": f"multipart/mixed; boundary={_BOUNDARY}"})


class _Handler(BaseHTTPRequestHandler):
    gcs: FakeGcs
    protocol_version = "HTTP/1.1"  # connections are kept
    disable_nagle_algorithm = True

    def _do(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = self.gcs.answer(self.command, self.path, self.headers, body)
        if answer.status == 499:
            self.send_response(499, "Client Closed Request")
        else:
            self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD" and answer.status not in (204, 304):
            self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _do

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client was killed
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


def _parts(content_type: str, body: bytes) -> list[tuple[str, bytes]]:
    """The parts of a multipart body, each as its head and its content."""
    match = re.search(r"""boundary=(?:'([^']+)'|"([^"]+)"|([^;\s]+))""", content_type)
    assert match, content_type
    boundary = b"--" + (match[1] or match[2] or match[3]).encode()
    parts = []
    for part in (b"\n" + body).split(b"\n" + boundary)[1:-1]:
        head, content = re.split(rb"\r?\n\r?\n", part, maxsplit=1)
        parts.append((head.decode(), content.removesuffix(b"\r")))
    return parts


def _header(head: str, name: str) -> str:
    match = re.search(rf"^{name}:\s*(.*?)\s*$", head, re.IGNORECASE | re.MULTILINE)
    return match[1] if match else ""


def _json(value: dict[str, Any]) -> _Answer:
    return _Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json; charset=UTF-8"})


def _error(status: int, message: str) -> _Answer:
    reason = {401: "authError", 403: "forbidden", 404: "notFound", 412: "conditionNotMet"}.get(status, "backendError")
    errors = [{"message": message, "domain": "global", "reason": reason}]
    return _json({"error": {"code": status, "message": message, "errors": errors}})._replace(status=status)


def _about_bucket(name: str) -> dict[str, Any]:
    about = {"kind": "storage#bucket", "id": name, "name": name, "projectNumber": "1", "metageneration": "1"}
    where = {"location": "US-CENTRAL1", "locationType": "region", "storageClass": "STANDARD", "etag": "CAE="}
    return {**about, **where, "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z"}


def _about(bucket: str, name: str, held: Object) -> dict[str, Any]:
    return {
        **{"contentType": "application/octet-stream", **{k: v for k, v in held.about.items() if v is not None}},
        **{"kind": "storage#object", "bucket": bucket, "name": name, "storageClass": "STANDARD"},
        "id": f"{bucket}/{name}/{held.generation}",
        "generation": str(held.generation),
        "metageneration": "1",
        "size": str(len(held.content)),
        "md5Hash": _md5(held.content),
        "crc32c": _crc32c(held.content),
        "etag": base64.b64encode(str(held.generation).encode()).decode(),
        "updated": held.about["timeCreated"],
        "mediaLink": f"/download/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media",
    }


def _md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content).digest()).decode()


def _crc32c(content: bytes) -> str:
    return base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()
