"""A process that has imported what takes seconds to import, and forks itself for each command of a test.

Importing TensorFlow alone takes longer than most of the commands that tests start. `Forked` is a `subprocess.Popen` for
`[sys.executable, "-m", MODULE, ...]` whose process is forked from the server: with its own arguments, environment,
folder, output and signals, but with libraries that are imported already.
"""

import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import warnings
from functools import cache
from typing import Any, NoReturn

from tests.helpers.paths import ROOT


class Forked(subprocess.Popen):
    """A command in a fork of the server."""

    def _execute_child(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(super()._execute_child).bind(*args, **kwargs).arguments
        request = {"args": given["args"][2:], "env": dict(given["env"] or os.environ), "cwd": str(given["cwd"] or ROOT)}
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        with theirs:
            socket.send_fds(
                _server(), [json.dumps(request).encode()], [theirs.fileno(), given["c2pwrite"], given["errwrite"]]
            )
        self._close_pipe_fds(*ends)
        self.pid = int(self._status.recv(16))
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
        self._status.setblocking(wait_flags != os.WNOHANG)
        try:
            return self.pid, int(self._status.recv(16))
        except BlockingIOError:
            return 0, 0


@cache
def _server() -> socket.socket:
    """The server's socket; the server ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        line = [sys.executable, "-m", "tests.helpers.fork_server", str(theirs.fileno())]
        env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}  # read at the import
        subprocess.Popen(line, pass_fds=[theirs.fileno()], cwd=ROOT, env=env, stdin=subprocess.DEVNULL)
    return ours


def serve(requests: socket.socket) -> None:
    """Forks for each request: a process that waits, and its child, which becomes the command."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            return
        if _fork() == 0:
            requests.close()
            break
        for file in files:
            os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status, out, err = files
    child = _fork()
    if child == 0:
        os.close(status)
        os.dup2(out, 1)
        os.dup2(err, 2)
        _become(**json.loads(message))
    os.close(out)
    os.close(err)
    with socket.socket(fileno=status) as answer:
        answer.send(str(child).encode())
        _, code = os.waitpid(child, 0)
        answer.send(str(code).encode())
    os._exit(0)


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about threads: those of the libraries are idle
        return os.fork()


def _become(args: list[str], env: dict[str, str], cwd: str) -> NoReturn:
    """Runs `-m MODULE ARGUMENTS`, then ends as any Python does."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for name, value in env.items():  # JAX has read these when it was imported
        if name.startswith("JAX_") and hasattr(jax.config, name.lower()):
            default = getattr(jax.config, name.lower())
            jax.config.update(name.lower(), value if default is None else type(default)(value))
    sys.path[:0] = [cwd]
    sys.argv[1:] = args[1:]
    runpy.run_module(args[0], run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    from flax_mlm.distributed import environment

    environment.prepare_paths()
    import jax

    serve(socket.socket(fileno=int(sys.argv[1])))
