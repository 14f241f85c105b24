"""A process that has imported what takes seconds to import, and forks itself for each command of a test.

TensorFlow, or gcloud's own modules, take longer to import than most of the commands that tests start. `Forked` is a
`subprocess.Popen` for flax_mlm's commands; `python_program` and `gcloud_program` make programs for scripts. All end in
a fork of such a server: a process of its own, with its own arguments, environment, folder, files and signals.

This file is also the program of the servers, and of the client that asks them; so it imports little.
"""

import contextlib
import fcntl
import gc
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

_ROOT = str(Path(__file__).parents[2])
_address = ""  # of this server
NUMBER = struct.Struct("i")  # what a server answers: the process id, then the status that `os.waitpid` gives


class Forked(subprocess.Popen):
    """A command `[python, "-m", "flax_mlm.COMMAND", ...]` in a fork of a server that has imported what it needs.

    What such a command starts is forked too. Other commands are started as ever.
    """

    _server: socket.socket | None = None

    def _execute_child(self, *args: Any, **kwargs: Any) -> None:
        import inspect

        given = inspect.signature(super()._execute_child).bind(*args, **kwargs).arguments
        command = given["args"]
        env = dict(given["env"] or os.environ)
        line = " ".join(map(str, command)) if isinstance(command, list) else ""
        is_ours = line.startswith(f"{sys.executable} -m flax_mlm.")
        if not is_ours or env.get("PYTHONPATH", _ROOT) != _ROOT:  # the latter with other modules than the server's
            return super()._execute_child(*args, **kwargs)
        pipes = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        ends = (given["p2cread"], given["c2pwrite"], given["errwrite"])
        files = {number: number if end < 0 else end for number, end in enumerate(ends)}
        files |= {number: number for number in given["pass_fds"]}
        self._server = ask(
            flax_mlm_server(), files, args=list(map(str, command[1:])), env=env,
            cwd=str(given["cwd"] or os.getcwd()), new_session=given["start_new_session"],
            # With preexec_fn, `sweep` asks for this, and nobody for anything else.
            signal_at_end=signal.SIGTERM if given["preexec_fn"] else 0,
        )  # fmt: skip
        self._close_pipe_fds(*pipes)
        self.pid = receive(self._server)
        self._child_created = True

    def _internal_poll(self, **kwargs: Any) -> int | None:
        if self._server is None:
            return super()._internal_poll(**kwargs)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._server is None:
            return super()._try_wait(wait_flags)
        if wait_flags == os.WNOHANG and not select.select([self._server], [], [], 0)[0]:
            return 0, 0
        with self._server:
            return self.pid, receive(self._server)


def ask(server: str, files: dict[int, int], **request: Any) -> socket.socket:
    """Sends a command to a server; returns the connection that answers.

    Args:
      files: number in the command -> number here.
      request: arguments of `_become`, and `signal_at_end`: sent to the command when this process ends before it.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server)
    content = json.dumps({**request, "numbers": list(files)}).encode()
    socket.send_fds(connection, [NUMBER.pack(len(content))], list(files.values()))
    connection.sendall(content)
    return connection


def receive(connection: socket.socket) -> int:
    return NUMBER.unpack(connection.recv(NUMBER.size, socket.MSG_WAITALL))[0]


@cache
def flax_mlm_server() -> str:
    """Address of the server for `Forked`: of the one that this process is a fork of, or its own."""
    if _address:
        return _address
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
    return f'#!/bin/bash\n{_asking(gcloud_server(gcloud))} "{program}" "$@"\n'


def python_program() -> str:
    """A script that does what Python does, with flax_mlm's commands in a fork."""
    if not issubclass(subprocess.Popen, Forked):
        return f'#!/bin/bash\nexec "{sys.executable}" "$@"\n'
    forks = f'if [[ "$1 $2" == "-m flax_mlm."* ]]; then {_asking(flax_mlm_server())} "$@"; fi'
    return f'#!/bin/bash\n{forks}\nexec "{sys.executable}" "$@"\n'


def _asking(server: str) -> str:
    return f'exec "{sys.executable}" -I -S "{__file__}" ask "{server}"'


def serve(address: str) -> None:
    """Forks for each request, until standard input is closed."""
    global _address
    _address = address
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()  # no fork needs to look through what was imported
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
    length, files, _, _ = socket.recv_fds(connection, NUMBER.size, 8)
    request = json.loads(connection.recv(NUMBER.unpack(length)[0], socket.MSG_WAITALL))
    numbers, signal_at_end = request.pop("numbers"), request.pop("signal_at_end")
    child = _fork()
    if child == 0:
        connection.close()
        # Out of the way of one another first.
        files = [fcntl.fcntl(file, fcntl.F_DUPFD, 100) for file in files]
        for number, file in zip(numbers, files, strict=True):
            os.dup2(file, number)
        _become(**request)
    for file in (0, 1, 2, *files):
        os.close(file)
    connection.send(NUMBER.pack(child))
    ended = status = 0
    while not ended:  # gcloud's Python knows no os.pidfd_open
        if signal_at_end and select.select([connection], [], [], 0.02)[0]:
            os.kill(child, signal_at_end)
            signal_at_end = 0
        ended, status = os.waitpid(child, os.WNOHANG if signal_at_end else 0)
    with contextlib.suppress(BrokenPipeError):
        connection.send(NUMBER.pack(status))
    os._exit(0)


def _become(args: list[str], env: dict[str, str], cwd: str, new_session: bool = False) -> NoReturn:
    """Runs the command, then ends as any Python does."""
    os.closerange(100, 200)
    if new_session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "PYTHONUNBUFFERED" in env:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    if "jax" in sys.modules:
        _read_jax_settings(env)
        subprocess.Popen = Forked  # type: ignore[misc]
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
            kind = {type(None): str, bool: lambda text: text.lower() in ("1", "true", "on")}
            jax.config.update(name.lower(), kind.get(type(default), type(default))(value))


def _import_flax_mlm() -> None:
    from flax_mlm.distributed import environment

    environment.prepare_paths()
    for name in ("tensorflow", "orbax.checkpoint", "flax_mlm.training.loop"):
        importlib.import_module(name)


_GCLOUD = (
    "googlecloudsdk.gcloud_main",
    "googlecloudsdk.api_lib.storage.gcs_json.client",
    "googlecloudsdk.command_lib.storage.tasks.cp.copy_util",
    "googlecloudsdk.command_lib.storage.user_request_args_factory",
    "googlecloudsdk.command_lib.storage.wildcard_iterator",
    "googlecloudsdk.core.credentials.transports",
)


def _import_gcloud() -> None:
    library = Path(os.environ["CLOUDSDK_ROOT_DIR"]) / "lib"
    sys.path[:0] = [str(library / "third_party"), str(library)]
    for name in _GCLOUD:
        importlib.import_module(name)


def _be_client(server: str, args: list[str]) -> NoReturn:
    """Runs a command with these arguments, and ends as it does."""
    files = {number: number for number in range(3)}
    line = {"args": args, "env": dict(os.environ), "cwd": os.getcwd()}
    connection = ask(server, files, **line, signal_at_end=signal.SIGKILL)
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
