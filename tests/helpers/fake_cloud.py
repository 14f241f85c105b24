"""A stand-in for Google Cloud: its REST APIs, as far as `gcloud` needs them to run TPUs, with processes of this machine
for the machines of a TPU.

    with FakeCloud(tmp_path) as cloud:
        subprocess.run(["bash", "launch/tpu.sh", ...], env=cloud.env)

The machines run their start-up script in folders of their own, and see a metadata server and programs such as
systemd-run; ssh takes one to them by their address. Cloud Storage is fake_gcs.FakeGcs.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.helpers import xla
from tests.helpers.fake_gcs import FakeGcs
from tests.helpers.fork_server import gcloud_program

PROJECT, ZONE, BUCKET = "p", "us-central1-a", "bucket"

SSH = """#!{python}
# ssh to a machine of the stand-in: the address is the first argument with an @, the command what follows it.
import json, os, sys
at = next(i for i, a in enumerate(sys.argv) if "@" in a and not a.startswith("-"))
machine = json.load(open("{folder}/machines/" + sys.argv[at].split("@")[1] + "/machine.json"))
command = " ".join(sys.argv[at + 1:]).removeprefix("-- ") or "true"
os.chdir(machine["folder"])
drops = "{folder}/drops"
if os.path.exists(drops):  # the connection breaks while the command runs
    os.remove(drops)
    os.spawnve(os.P_WAIT, "/bin/bash", ["bash", "-c", command], machine["env"])
    sys.exit(255)
os.execve("/bin/bash", ["bash", "-c", command], machine["env"])
"""
# What the machines have: a service manager, Google's agent, a package manager.
SYSTEMD_RUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
for word in [w for w in words if w.startswith("--setenv=")]:
    name, value = word.removeprefix("--setenv=").split("=", 1)
    os.environ[name] = value
command = [w for w in words if not w.startswith("--")] if "--" not in words else words[words.index("--") + 1:]
output = open(os.environ["MACHINE"] + "/service.log", "ab")
service = subprocess.Popen(command, start_new_session=True, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
kill = "one" if "--property=KillMode=mixed" in words else "all"
with open(os.environ["MACHINE"] + "/services", "a") as f:
    f.write(f"{{service.pid}} {{kill}}\\n")
"""
AGENT = """#!/bin/bash
curl -s "http://$GCE_METADATA_HOST/computeMetadata/v1/instance/attributes/startup-script" >"$MACHINE/startup.sh"
bash "$MACHINE/startup.sh" >>"$MACHINE/startup.log" 2>&1
"""
UV = """#!/bin/bash
echo "uv $*" >>"$MACHINE/uv.log"
if [ -e "$MACHINE/../../no_packages" ]; then exit 1; fi
case "$1" in
venv) python={python}
  if [ -e "$MACHINE/../../train" ]; then python="bash $MACHINE/../../train"; fi
  bin="${{@: -1}}/bin"
  mkdir -p "$bin"
  printf '#!/bin/bash\\nexec %s "$@"\\n' "$python" >"$bin/python"
  chmod +x "$bin/python" ;;
pip) if [ "$2" = freeze ]; then echo "jax==0"; fi ;;
esac
"""


class Machine:
    """One host of a TPU: a folder, an address, and what runs there."""

    def __init__(self, cloud: "FakeCloud", node: dict[str, Any], slice_index: int, worker: int, address: str):
        self.address, self.folder = address, cloud.folder / "machines" / address
        self.folder.mkdir(parents=True)
        index = slice_index * cloud.hosts + worker
        tpu_env = f"ACCELERATOR_TYPE: '{node['acceleratorType']}'\nWORKER_ID: '{worker}'\n"
        if cloud.slices > 1:
            tpu_env += f"MEGASCALE_NUM_SLICES: '{cloud.slices}'\nMEGASCALE_SLICE_ID: '{slice_index}'\n"
        self.attributes = {**node["metadata"], "tpu-env": tpu_env, "agent-worker-number": str(worker)}
        metadata = functools.partial(_Metadata, self.attributes)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), metadata)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.env = {
            **cloud.env, **cloud.machine_env, "MACHINE": str(self.folder), "WORKER_HOME": str(self.folder / "home"),
            "GCE_METADATA_HOST": f"127.0.0.1:{self._server.server_port}",
            "PATH": f"{cloud.folder / 'machine_bin'}:{cloud.env['PATH']}",
            "JAX_NUM_PROCESSES": str(cloud.hosts * cloud.slices), "JAX_PROCESS_ID": str(index),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{cloud.port}",
        }  # fmt: skip
        about = {"folder": str(self.folder), "env": self.env}
        (self.folder / "machine.json").write_text(json.dumps(about))
        self._boot: subprocess.Popen | None = None

    def boot(self) -> None:
        self._boot = subprocess.Popen(
            ["google_metadata_script_runner", "startup"], env=self.env, cwd=self.folder, start_new_session=True
        )

    def _services(self) -> dict[int, str]:
        """What runs here: sessions, and who of each is told to end, one process or all."""
        file = self.folder / "services"
        lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        found = {int(pid): whom for pid, whom in lines}
        return found | ({self._boot.pid: "all"} if self._boot else {})

    def end(self, grace: float = 0.0) -> None:
        """Power off: SIGTERM to what runs, and after `grace` seconds SIGKILL."""
        services = self._services()
        if grace:
            for pid, whom in services.items():
                with contextlib.suppress(ProcessLookupError):
                    (os.kill if whom == "one" else os.killpg)(pid, signal.SIGTERM)
            end = time.monotonic() + grace
            while time.monotonic() < end and any(map(_lives, services)):
                time.sleep(0.1)
        for pid in services:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._server.shutdown()
        self._server.server_close()
        (self.folder / "machine.json").unlink(missing_ok=True)

    def log(self) -> str:
        return "".join(p.read_text() for p in sorted(self.folder.glob("*.log")))


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class FakeCloud:
    """Starts at `with`; at its end nothing of it runs any more.

    Attributes:
      env: for gcloud and the launch scripts.
      machine_env: more of it for the machines.
      queued: name -> queued resource, as the API shows it.
      nodes: name -> node, likewise. What is in here is paid for.
      answers: (method, a pattern of the path) -> what to answer instead: a status, or (status, message).
      created: how many queued resources there have been.
      hosts: of a slice; with 0 nothing runs, and `on_active` says what machines would have said.
      plan: what becomes of each of them, in turn: a function called with the name when it is created, in a thread;
        by default it becomes active.
    """

    def __init__(self, folder: Path, hosts: int = 2, slices: int = 1):
        self.folder, self.hosts, self.slices = folder, hosts, slices
        self.gcs = FakeGcs(BUCKET)
        self.queued: dict[str, dict[str, Any]] = {}
        self.nodes: dict[str, dict[str, Any]] = {}
        self.machines: dict[str, list[Machine]] = {}
        self.answers: dict[tuple[str, str], int | tuple[int, str]] = {}
        self.quota, self.services, self.created, self.port = 1000, ["tpu.googleapis.com"], 0, 0
        self.plan: list[Callable[[str], None]] = []
        self.on_active: Callable[[], None] = lambda: None
        self.deletions_that_fail = 0
        self.calls: list[str] = []
        self._addresses = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Api, self))
        self._server.daemon_threads = True
        url = f"http://127.0.0.1:{self._server.server_port}"
        installed = shutil.which("gcloud")
        gcloud = {"bin/gcloud": gcloud_program(installed)} if installed else {}
        for name, text in {"bin/ssh": SSH, "machine_bin/systemd-run": SYSTEMD_RUN, "machine_bin/uv": UV,
                           "machine_bin/google_metadata_script_runner": AGENT,
                           "machine_bin/sudo": '#!/bin/bash\nexec "$@"\n', **gcloud}.items():  # fmt: skip
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                text.format(python=shlex.quote(sys.executable), folder=folder) if "{python}" in text else text
            )
            path.chmod(0o755)
        (folder / "user").mkdir()
        apis = ("tpu", "compute", "cloudresourcemanager", "serviceusage", "cloudquotas", "secretmanager")
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "CLOUDSDK_"))},
            **self.gcs.env,
            **{f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{api.upper()}": f"{url}/{api}/" for api in apis},
            "CLOUDSDK_COMPUTE_ZONE": ZONE, "HOME": str(folder / "user"), "USER": "user",
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "CLOUDSDK_CORE_DISABLE_FILE_LOGGING": "true", "POLL": "1", "GONE_AFTER": "40", "STOP_WITHIN": "60",
        }  # fmt: skip
        self.machine_env = {
            "JAX_PLATFORMS": "cpu", "WORKER_EVERY": "1", "WORKER_PAUSE": "0", "TF_CPP_MIN_LOG_LEVEL": "2",
            "XLA_FLAGS": xla.flags(1),
            "TF_ENABLE_ONEDNN_OPTS": "0",
        }  # fmt: skip

    def __enter__(self) -> "FakeCloud":
        self.gcs.__enter__()
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for machines in self.machines.values():
            for machine in machines:
                machine.end()
        self._server.shutdown()
        self._server.server_close()
        self.gcs.__exit__(*error)

    # What befalls TPUs.

    def become(self, name: str, state: str) -> None:
        if name in self.queued:
            self.queued[name]["state"] = {"state": state}

    def provide(self, name: str) -> None:
        """The TPUs of a queued resource come, and start."""
        self.become(name, "PROVISIONING")
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        (spec,) = self.queued[name]["tpu"]["nodeSpec"]
        many = spec.get("multisliceParams")
        names = [f"{many['nodeIdPrefix']}-{i}" for i in range(int(many["nodeCount"]))] if many else [spec["nodeId"]]
        for slice_index, node_name in enumerate(names):
            node = {**spec["node"], "name": f"projects/{PROJECT}/locations/{ZONE}/nodes/{node_name}", "state": "READY"}
            node.update(id=str(slice_index + 1), apiVersion="V2")
            machines = []
            for worker in range(self.hosts):
                self._addresses += 1
                machines.append(Machine(self, node, slice_index, worker, f"127.0.9.{self._addresses}"))
            node["networkEndpoints"] = [
                {"ipAddress": m.address, "port": 8470, "accessConfig": {"externalIp": m.address}} for m in machines
            ]
            self.nodes[node_name], self.machines[node_name] = node, machines
        self.become(name, "ACTIVE")
        for node_name in names:
            for machine in self.machines[node_name]:
                machine.boot()
        self.on_active()

    def take_away(self, name: str, grace: float = 20.0) -> None:
        """Preemption: the machines end; the queued resource stays, and does nothing any more."""
        self.become(name, "SUSPENDING")
        threads = [
            threading.Thread(target=machine.end, args=(grace,))
            for node_name in self._nodes_of(name)
            for machine in self.machines.pop(node_name)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for node_name in self._nodes_of(name):
            del self.nodes[node_name]
        self.become(name, "SUSPENDED")

    def _nodes_of(self, name: str) -> list[str]:
        return [n for n in self.nodes if n == name or n.startswith(f"{name}-")]

    def say(self, name: str, text: str) -> None:
        """Puts an object of the run `run`, as a machine would."""
        self.gcs.put(BUCKET, f"flax_mlm/run/{name}", text.encode())

    def says(self, name: str) -> str:
        """Content of an object of the run `run`, "" where it is not there."""
        held = self.gcs.buckets[BUCKET].get(f"flax_mlm/run/{name}")
        return held.content.decode() if held else ""

    def logs(self) -> str:
        return "\n".join(machine.log() for machines in self.machines.values() for machine in machines)

    def queue(self) -> None:
        """What `tpu.sh submit` leaves behind, for what comes after it."""
        self.say("bundle.tgz", "")
        node = {"acceleratorType": "v5litepod-8", "labels": {"flax_mlm": "run"}, "metadata": {}}
        self._create("run", {"tpu": {"nodeSpec": [{"nodeId": "run", "node": node}]}})

    # The APIs.

    def answer(self, method: str, path: str, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        self.calls.append(f"{method} {path}")
        for (m, pattern), answer in self.answers.items():
            if m == method and re.search(pattern, path):
                status, message = answer if isinstance(answer, tuple) else (answer, "a fault of the test")
                return status, _error(status, message)
        api, *rest = path.strip("/").split("/")
        if api == "tpu":
            return self._tpu(method, rest[1:], query, body)
        if api == "cloudresourcemanager":
            return 200, {"projectId": PROJECT, "projectNumber": "1", "lifecycleState": "ACTIVE"}
        if api == "serviceusage":
            return 200, {"services": [{"config": {"name": name}, "state": "ENABLED"} for name in self.services]}
        if api == "cloudquotas":
            here = {"dimensions": {"zone": ZONE}, "details": {"value": str(self.quota)}, "applicableLocations": [ZONE]}
            quotas = [{"quotaId": f"TPUV5s{kind}LitepodPerProjectPerZoneForTPUAPI", "dimensionsInfos": [here]}
                      for kind in ("", "Preemptible")]  # fmt: skip
            return 200, {"quotaInfos": quotas}
        if api == "secretmanager":
            return 200, {"payload": {"data": "c2VjcmV0"}}
        if api == "compute":
            return 200, {"name": PROJECT, "commonInstanceMetadata": {"fingerprint": "", "items": []}}
        return 404, _error(404, f"no API {api}")

    def _tpu(self, method: str, path: list[str], query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        kind, name = [*path[4:], "", ""][:2]  # projects/P/locations/Z/KIND/NAME
        if kind == "operations":
            return 200, self._operation(self.nodes.get(name, {}))
        if kind in ("acceleratorTypes", "runtimeVersions"):
            return 200, {"name": "/".join(path), "type": name, "version": name}
        held = {"queuedResources": self.queued, "nodes": self.nodes}.get(kind)
        name, _, verb = name.partition(":")
        if held is None:
            return 404, _error(404, f"no such thing: {'/'.join(path)}")
        if verb == "getGuestAttributes":
            keys = [{"namespace": "hostkeys", "key": "ssh-ed25519", "value": "AAAA"}]
            return 200, {"guestAttributes": [{"queryValue": {"items": keys}}] * self.hosts}
        if method == "POST":
            return self._create(query["queuedResourceId"], body)
        if not name:
            return 200, {kind: list(held.values())}
        if name not in held:
            return 404, _error(404, f"Resource '{'/'.join(path)}' was not found")
        if method == "DELETE":
            if self.deletions_that_fail:
                self.deletions_that_fail -= 1
                return 500, _error(500, "Internal error: deletion failed")
            self._delete(name, kind)
            return 200, self._operation()
        if method == "PATCH":
            held[name].update(body)
            return 200, self._operation(held[name])
        return 200, held[name]

    def _create(self, name: str, body: dict[str, Any]) -> tuple[int, Any]:
        if name in self.queued:
            return 409, _error(409, f"Resource '{name}' already exists")
        self.queued[name] = {**body, "name": f"projects/{PROJECT}/locations/{ZONE}/queuedResources/{name}"}
        self.become(name, "WAITING_FOR_RESOURCES")
        what = self.plan[self.created] if self.created < len(self.plan) else self.provide
        self.created += 1
        threading.Thread(target=what, args=(name,), daemon=True).start()
        return 200, self._operation()

    def _delete(self, name: str, kind: str) -> None:
        for node_name in self._nodes_of(name) if kind == "queuedResources" else [name]:
            for machine in self.machines.pop(node_name, []):
                machine.end()
            del self.nodes[node_name]
        self.queued.pop(name, None)

    def _operation(self, result: dict[str, Any] | None = None) -> dict[str, Any]:
        """One that is done already; asked for again by its name, it has the same result."""
        name = (result or {}).get("name", "none").rsplit("/", 1)[-1]
        parent = f"projects/{PROJECT}/locations/{ZONE}"
        return {"name": f"{parent}/operations/{name}", "done": True, "response": result or {}}


def _error(status: int, message: str) -> dict[str, Any]:
    names = {400: "INVALID_ARGUMENT", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 409: "ALREADY_EXISTS",
             429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE"}  # fmt: skip
    return {"error": {"code": status, "message": message, "status": names[status]}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, body: bytes, kind: str = "application/json; charset=UTF-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        self.wfile.write(body)


class _Api(_Handler):
    def __init__(self, cloud: FakeCloud, *arguments: Any):
        self.cloud = cloud
        super().__init__(*arguments)

    def _do(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        status, answer = self.cloud.answer(self.command, parts.path, query, body)
        self.send(status, json.dumps(answer).encode())

    do_GET = do_POST = do_PATCH = do_DELETE = _do


class _Metadata(_Handler):
    def __init__(self, attributes: dict[str, str], *arguments: Any):
        self.attributes = attributes
        super().__init__(*arguments)

    def do_GET(self) -> None:
        value = self.attributes.get(self.path.rsplit("/", 1)[1])
        self.send(404 if value is None else 200, (value or "").encode(), "application/text")
