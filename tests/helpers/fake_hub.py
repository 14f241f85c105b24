"""A stand-in for the Hugging Face Hub: what `datasets` asks it about datasets, and how it answers.

    with FakeHub() as hub:
        hub.put("org/name", {"data/train-0.parquet": content})
        subprocess.run([...], env={**os.environ, **hub.env(home)})

It listens on 127.0.0.1 only, and keeps everything in memory. A commit's name follows from its content.
"""

import contextlib
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_tests"


class FakeHub:
    """Starts at `with`, and stops at its end.

    Attributes:
      commits: dataset -> commit -> path -> content.
      refs: dataset -> branch -> commit.
      closed: dataset -> `gated` or `private`: files, or all, are for requests with a token only.
      requests: method and path of each request.
      sent: bytes of files.
      max_bytes: after which it stops; None for no limit.
      delay: seconds before each answer.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.closed: dict[str, str] = {}
        self.requests: list[str] = []
        self.sent = 0
        self.max_bytes: int | None = None
        self.delay = 0.0
        self._server: ThreadingHTTPServer | None = None
        self._lock = threading.Lock()
        self.port = 0

    def put(self, dataset: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Adds a commit with these files. Returns its name."""
        digest = hashlib.sha1(b"".join(name.encode() + b"\0" + content for name, content in sorted(files.items())))
        commit = digest.hexdigest()
        self.commits.setdefault(dataset, {})[commit] = files
        self.refs.setdefault(dataset, {})[branch] = commit
        return commit

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """Environment variables that point Hugging Face's libraries to it, with caches of their own."""
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**own, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", **more}

    def __enter__(self) -> "FakeHub":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listens, on the same port as before."""
        with self._lock:
            handler = type("Handler", (_Handler,), {"hub": self})
            kind = type("Server", (ThreadingHTTPServer,), {"allow_reuse_address": True, "daemon_threads": True})
            self._server = kind(("127.0.0.1", self.port), handler)
            self.port = self._server.server_port
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self, server: object = None) -> None:
        """Refuses connections from now on; also called with what has just answered for the last time."""
        with self._lock:
            if self._server and server in (None, self._server):
                self._server.shutdown()
                self._server.server_close()
                self._server = None

    @property
    def is_up(self) -> bool:
        """Whether it answers."""
        return self._server is not None and (self.max_bytes is None or self.sent < self.max_bytes)

    def answer(self, path: str, body: bytes, has_token: bool) -> tuple[int, dict[str, str], bytes]:
        """Returns the status, headers and content for a request."""
        if match := re.fullmatch(r"/datasets/(.+?)/resolve/([^/]+)/(.+)", path):
            return self._file(match[1], match[2], match[3], has_token)
        match = re.fullmatch(
            r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/([^/]+))?(?:/(.*))?)?", path
        )
        if not match:
            return as_error(404, "EntryNotFound", "no such page")
        dataset, kind, revision, below = match.groups()
        if dataset not in self.commits or (self.closed.get(dataset) == "private" and not has_token):
            return as_error(401, "RepoNotFound" if has_token else "", "Invalid username or password.")
        if kind == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in self.refs[dataset].items()]
            return as_json({"branches": branches, "tags": [], "converts": []})
        commit = self._commit(dataset, revision or "main")
        if not commit:
            return as_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = self.commits[dataset][commit]
        if kind == "paths-info":
            wanted = set(json.loads(body)["paths"])
            return as_json([entry for entry in _entries(files, "", True) if entry["path"] in wanted])
        if kind == "tree":
            entries = _entries(files, below or "", True)
            return as_json(entries) if entries else as_error(404, "EntryNotFound", f"{below} does not exist")
        about = {"_id": "0", "id": dataset, "sha": commit, "private": False, "gated": False, "disabled": False}
        if card := re.match(rb"---\n(.*?)\n---\n", files.get("README.md", b""), re.DOTALL):
            about["cardData"] = yaml.safe_load(card[1])
        return as_json({**about, "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": n} for n in files]})

    def _commit(self, dataset: str, revision: str) -> str | None:
        revision = unquote(revision)
        return revision if revision in self.commits[dataset] else self.refs[dataset].get(revision)

    def _file(self, dataset: str, revision: str, name: str, has_token: bool) -> tuple[int, dict[str, str], bytes]:
        if dataset not in self.commits or (self.closed.get(dataset) == "private" and not has_token):
            return as_error(401, "RepoNotFound" if has_token else "", "Invalid username or password.")
        if self.closed.get(dataset) == "gated" and not has_token:
            return as_error(401, "GatedRepo", f"Access to dataset {dataset} is restricted.")
        commit = self._commit(dataset, revision)
        if not commit:
            return as_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = self.commits[dataset][commit].get(unquote(name))
        about = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if content is None:
            status, headers, message = as_error(404, "EntryNotFound", "Entry not found")
            return status, {**headers, **about}, message
        return 200, {**about, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        time.sleep(self.hub.delay)
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        status, headers, content = self.hub.answer(path, body, has_token)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and status == 200:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            status, content = 206, content[first : last + 1]
        if "/resolve/" in path and self.command == "GET":
            self.hub.sent += len(content)
        if not self.hub.is_up:
            self.close_connection = True
            threading.Thread(target=self.hub.stop, args=(self.server,)).start()
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = _do

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client was killed
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


def _entries(files: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
    """Lists files and folders as the hub does."""
    entries: dict[str, dict[str, Any]] = {}
    for name, content in sorted(files.items()):
        if below and not name.startswith(below + "/"):
            continue
        parts = name.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if len(folder) > len(below):
                entries[folder] = {"type": "directory", "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0}
        entries[name] = {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
    return [{**entry, "path": path} for path, entry in entries.items()]


def as_json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(value).encode()


def as_error(status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
    headers = {"Content-Type": "application/json; charset=utf-8", "X-Error-Message": message}
    return status, headers | ({"X-Error-Code": code} if code else {}), json.dumps({"error": message}).encode()
