"""A process that has imported what takes seconds to import, and forks itself for each command of a test.

TensorFlow, or gcloud's own modules, take longer to import than most of the commands that tests start. `Forked` is a
`subprocess.Popen` for `[python, "-m", MODULE, ...]`, and `gcloud_program` makes a program that stands for gcloud. Both
end in a fork of such a server: a process of its own, with its own arguments, environment, folder, files and signals.

This file is also the program of the servers, and of the client that asks them; so it imports little.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

NUMBER = struct.Struct("i")  # what a server answers: the process id, then the status that `os.waitpid` gives


class Forked(subprocess.Popen):
    """A command `[python, "-m", MODULE, ...]` in a fork of a server that has imported what flax_mlm needs."""

    def _execute_child(self, *args: Any, **kwargs: Any) -> None:
        import inspect

        given = inspect.signature(super()._execute_child).bind(*args, **kwargs).arguments
        pipes = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        ends = (given["p2cread"], given["c2pwrite"], given["errwrite"])
        files = [number if end < 0 else end for number, end in enumerate(ends)]
        cwd = str(given["cwd"] or os.getcwd())
        self._server = ask(flax_mlm_server(), given["args"][1:], dict(given["env"] or os.environ), cwd, files)
        self._close_pipe_fds(*pipes)
        self.pid = receive(self._server)
        self._child_created = True

    def _internal_poll(self, **_: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags == os.WNOHANG and not select.select([self._server], [], [], 0)[0]:
            return 0, 0
        with self._server:
            return self.pid, receive(self._server)


def ask(server: str, args: list[str], env: dict[str, str], cwd: str, files: list[int]) -> socket.socket:
    """Sends a command to a server; returns the connection that answers."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server)
    request = json.dumps({"args": args, "env": env, "cwd": cwd}).encode()
    socket.send_fds(connection, [NUMBER.pack(len(request))], files)
    connection.sendall(request)
    return connection


def receive(connection: socket.socket) -> int:
    return NUMBER.unpack(connection.recv(NUMBER.size, socket.MSG_WAITALL))[0]


@cache
def flax_mlm_server() -> str:
    """Address of this process's server for `Forked`."""
    # TensorFlow reads these when it is imported.
    return _start(
        sys.executable, "-m", "tests.helpers.fork_server", TF_CPP_MIN_LOG_LEVEL="2", TF_ENABLE_ONEDNN_OPTS="0"
    )


@cache
def gcloud_server(gcloud: str) -> str:
    """Address of this process's server for an installed gcloud."""
    root = Path(gcloud).resolve().parent.parent
    bundled = root / "platform" / "bundledpythonunix" / "bin" / "python3"
    python = str(bundled) if bundled.exists() else "python3"
    return _start(python, "-I", __file__, CLOUDSDK_ROOT_DIR=str(root), PYTHONIOENCODING="UTF-8")


def _start(*line: str, **env: str) -> str:
    """Starts a server, which ends with this process."""
    address = os.path.join(tempfile.mkdtemp(), "socket")
    server = subprocess.Popen([*line, "serve", address], env={**os.environ, **env}, stdin=subprocess.PIPE)
    while not os.path.exists(address):
        assert server.poll() is None, "the server ended"
        time.sleep(0.02)
    return address


def gcloud_program(gcloud: str) -> str:
    """A script that does what `gcloud` does."""
    program = Path(gcloud).resolve().parent.parent / "lib" / "gcloud.py"
    return f'#!/bin/bash\nexec "{sys.executable}" -I -S "{__file__}" ask "{gcloud_server(gcloud)}" "{program}" "$@"\n'


def serve(address: str) -> None:
    """Forks for each request, until standard input is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as requests:
        requests.bind(address + ".new")
        requests.listen()
        os.rename(address + ".new", address)
        while True:
            if sys.stdin in select.select([requests, sys.stdin], [], [])[0]:
                return
            connection, _ = requests.accept()
            if _fork() == 0:
                break
            connection.close()
    _fork_command(connection)


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about threads: those of the libraries are idle
        return os.fork()


def _fork_command(connection: socket.socket) -> None:
    """Forks once more: this process waits for its child, which becomes the command."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, files, _, _ = socket.recv_fds(connection, NUMBER.size, 3)
    request = json.loads(connection.recv(NUMBER.unpack(length)[0], socket.MSG_WAITALL))
    child = _fork()
    if child == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        _become(**request)
    for file in (0, 1, 2, *files):
        os.close(file)
    connection.send(NUMBER.pack(child))
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.send(NUMBER.pack(status))
    os._exit(0)


def _become(args: list[str], env: dict[str, str], cwd: str) -> NoReturn:
    """Runs the command, then ends as any Python does."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "jax" in sys.modules:
        _read_jax_settings(env)
    sys.path[:0] = [cwd]
    if args[0] == "-m":
        sys.argv[1:] = args[2:]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")
    sys.exit()


def _read_jax_settings(env: dict[str, str]) -> None:
    """Does what JAX does with its variables when it is imported."""
    import jax

    for name, value in env.items():
        if name.startswith("JAX_") and hasattr(jax.config, name.lower()):
            default = getattr(jax.config, name.lower())
            jax.config.update(name.lower(), value if default is None else type(default)(value))


def _import_flax_mlm() -> None:
    from flax_mlm.distributed import environment

    environment.prepare_paths()
    for name in ("tensorflow", "orbax.checkpoint", "flax_mlm.training.loop"):
        importlib.import_module(name)


def _import_gcloud() -> None:
    library = Path(os.environ["CLOUDSDK_ROOT_DIR"]) / "lib"
    sys.path[:0] = [str(library / "third_party"), str(library)]
    import googlecloudsdk.gcloud_main  # noqa: F401


def _be_client(server: str, args: list[str]) -> NoReturn:
    """Runs gcloud with these arguments, and ends as it does."""
    connection = ask(server, args, dict(os.environ), os.getcwd(), [0, 1, 2])
    child = receive(connection)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    code = os.waitstatus_to_exitcode(receive(connection))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    verb, address = sys.argv[1:3]
    if verb == "ask":
        _be_client(address, sys.argv[3:])
    _import_gcloud() if "CLOUDSDK_ROOT_DIR" in os.environ else _import_flax_mlm()
    serve(address)
