"""A stand-in for the Hugging Face Hub that answers about models, and takes what is pushed.

    with FakeModelHub() as hub:
        hub.put("org/name", {"config.json": content, ...})

It is a `FakeHub` whose repositories are models. Large files come through Git LFS, as of a hub without Xet.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

from tests.helpers.fake_hub import FakeHub, as_error, as_json


def files_of(folder: Path) -> dict[str, bytes]:
    """Reads the files of a folder."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class FakeModelHub(FakeHub):
    """Attributes:
    role: of the token: `write` or `read`.
    owners: whose repositories the token may write to; the first is the user.
    readable: repositories of them that it may read only.
    revoked: those that it may write to by `auth-check` alone.
    pushed: repository -> messages of its commits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.role, self.owners = "write", ["someone", "team"]
        self.readable, self.revoked = set[str](), set[str]()
        self.pushed: dict[str, list[str]] = {}
        self._large: dict[str, bytes] = {}

    def answer(self, path: str, body: bytes, has_token: bool) -> tuple[int, dict[str, str], bytes]:
        own = re.fullmatch(r"/(?:api/(whoami-v2|repos/create|validate-yaml)|lfs/(\w+))", path)
        if own:
            return self._of_user(own[1], own[2], body, has_token)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(auth-check/write|preupload/main|commit/main)", path):
            return self._write(match[1], match[2].partition("/")[0], body, has_token)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            upload = f"http://127.0.0.1:{self.port}/lfs"
            objects = json.loads(body)["objects"]
            actions = [{**x, "actions": {"upload": {"href": f"{upload}/{x['oid']}"}}} for x in objects]
            return as_json({"transfer": "basic", "objects": actions})
        if path.startswith("/api/models/"):
            status, headers, content = super().answer(path.replace("models", "datasets", 1), body, has_token)
            private = any(f"/{name}" in path for name, kind in self.closed.items() if kind == "private")
            if private and status == 200:
                content = content.replace(b'"private": false', b'"private": true')
            return status, headers, content
        return super().answer(f"/datasets{path}", body, has_token)

    def _of_user(self, kind: str | None, oid: str, body: bytes, has_token: bool) -> tuple[int, dict[str, str], bytes]:
        if oid:
            assert hashlib.sha256(body).hexdigest() == oid
            self._large[oid] = body
            return 200, {}, b""
        if kind == "validate-yaml":
            return as_json({"errors": [], "warnings": []})
        if not has_token:
            return as_error(401, "", "Invalid credentials in Authorization header")
        if kind == "whoami-v2":
            orgs = [{"name": name} for name in self.owners[1:]]
            token = {"accessToken": {"role": self.role}}
            return as_json({"type": "user", "name": self.owners[0], "orgs": orgs, "auth": token})
        asked = json.loads(body)
        name = f"{asked['organization'] or self.owners[0]}/{asked['name']}"
        url = as_json({"url": f"http://127.0.0.1:{self.port}/{name}"})
        if name in self.commits:
            return 409, *url[1:]
        if asked["organization"] not in self.owners:
            return as_error(403, "", "You don't have the rights to create a model under this namespace")
        self.put(name, {})
        if asked.get("visibility") == "private" or asked.get("private"):
            self.closed[name] = "private"
        return url

    def _write(self, name: str, kind: str, body: bytes, has_token: bool) -> tuple[int, dict[str, str], bytes]:
        if not has_token or name in self.readable or name.partition("/")[0] not in self.owners:
            return as_error(403, "", "Forbidden: you must have write access")
        if kind == "auth-check":
            return as_json({})
        if name in self.revoked:
            return as_error(403, "", "Forbidden: you must have write access")
        if kind == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            files = [{"path": p, "uploadMode": mode[".safetensors" in p], "shouldIgnore": False} for p in paths]
            return as_json({"files": files})
        files = dict(self.commits[name][self.refs[name]["main"]])
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.pushed.setdefault(name, []).append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self._large[value["oid"]]
        commit = self.put(name, files)
        url = f"http://127.0.0.1:{self.port}/{name}/commit/{commit}"
        return as_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
