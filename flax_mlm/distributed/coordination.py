"""JAX's coordination service: the only file that uses its private client.

Process 0 runs two of them. The first, at the coordinator's address, holds the key-value store by which our processes
meet and watch each other. The second, on the next port, belongs to `jax.distributed`. They differ in what a client
may do: a store can be used before all processes are there, and survives clients that come twice or die. JAX's own
service lets nobody use it before all have registered, and a second process of one number ends the whole run. The
measurements are in docs/development/history.md, "Process layer".
"""

import contextlib
import ctypes
import faulthandler
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any, Self

from flax_mlm.distributed import slurm
from flax_mlm.errors import UserError

_NEVER = 10**6  # seconds: the store's clients have no heartbeat of JAX's, which would abort the process


class Unreachable(Exception):
    """The store gave no answer, or an error."""


class Store:
    """Key-value store of strings that all processes of a run share; process 0 serves it."""

    def __init__(self, client: Any, patience: float, service: Any = None):
        self._client = client
        self._patience = patience
        self._service = service
        self._requests = queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None]()
        self._thread = threading.Thread(target=self._serve_requests, name="store", daemon=True)
        self._thread.start()

    @classmethod
    def serve(cls, address: str, patience: float) -> Self:
        """Starts the store in this process.

        Args:
          address: IP:PORT, which must be free: gRPC itself would share a port with another process.
          patience: seconds to wait for the answer to a request.
        """
        from jaxlib import _jax

        # A recoverable service accepts any number of clients for its only node, so that none has to wait for others.
        service = _jax.get_distributed_runtime_service(
            address, 1, heartbeat_timeout=_NEVER, shutdown_timeout=1, recoverable=True
        )
        store = cls.connect(address, _NEVER, patience)
        assert store
        store._service = service
        return store

    @classmethod
    def connect(cls, address: str, timeout: float, patience: float) -> Self | None:
        """Connects to the store at HOST:PORT; returns None if there is none within `timeout` seconds."""
        from jaxlib import _jax

        client = _jax.get_distributed_runtime_client(
            address,
            0,
            init_timeout=_NEVER,  # when JAX's time is over it aborts the process
            heartbeat_timeout=_NEVER,
            shutdown_on_destruction=False,
            use_compression=True,
        )
        connected = threading.Event()

        def connect() -> None:
            client.connect()
            connected.set()

        threading.Thread(target=connect, name="connect", daemon=True).start()
        return cls(client, patience) if connected.wait(timeout) else None

    def set(self, key: str, value: str) -> None:
        """Sets or overwrites a key."""
        self._call(lambda: self._client.key_value_set(key, value, True))

    def set_once(self, key: str, value: str) -> None:
        """Sets a key that no process has set yet; else keeps its value."""
        try:
            self._call(lambda: self._client.key_value_set(key, value, False))
        except Unreachable as e:
            if "ALREADY_EXISTS" not in str(e):
                raise

    def delete(self, key: str) -> None:
        """Removes a key."""
        self._call(lambda: self._client.key_value_delete(key))

    def read(self, folder: str) -> dict[str, str]:
        """Reads all keys below `folder`, which ends in a slash, with their values."""
        return dict(self._call(lambda: self._client.key_value_dir_get(folder)))

    def exchange(self, key: str, value: str, folder: str) -> dict[str, str]:
        """Sets a key and reads a folder, as one request."""

        def exchange() -> list[tuple[str, str]]:
            self._client.key_value_set(key, value, True)
            return self._client.key_value_dir_get(folder)

        return dict(self._call(exchange))

    def close(self) -> None:
        """Disconnects, and ends the store where it is served."""
        with contextlib.suppress(Unreachable):
            self._call(self._client.shutdown)
        self._requests.put(None)
        self._thread.join(self._patience)
        if self._service:
            self._service.shutdown()

    def _call(self, request: Callable[[], Any]) -> Any:
        """Calls `request` in the store's thread, which may be stuck: JAX waits without end for a frozen process."""
        answers = queue.SimpleQueue[Any]()
        self._requests.put((request, answers))
        try:
            answer = answers.get(timeout=self._patience)
        except queue.Empty as e:
            raise Unreachable(f"no answer within {self._patience} s") from e
        if isinstance(answer, Exception):
            raise Unreachable(str(answer)) from answer
        return answer

    def _serve_requests(self) -> None:
        while entry := self._requests.get():
            request, answers = entry
            try:
                answers.put(request())
            except Exception as e:
                answers.put(e)


def check_free(host: str, port: int) -> str:
    """Returns IP:PORT of this machine, after a check that nobody listens there.

    Raises:
      UserError: the address belongs to another machine, or the port is in use.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as e:
        raise UserError(f"--coordinator={join_address(host, port)}: process 0 cannot listen there: {e.strerror}") from e
    return join_address(str(address[0]), port)


def split_address(address: str) -> tuple[str, int]:
    """Splits HOST:PORT."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """Joins HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def detect(address: str | None, count: int | None, index: int | None, timeout: int) -> tuple[Any, Any, Any]:
    """Detects coordinator, number of processes and index, as `jax.distributed.initialize` does."""
    from jax._src.clusters import ClusterEnv

    return ClusterEnv.auto_detect_unset_distributed_params(address, count, index, [], None, timeout)[:3]


def bypass_proxies(host: str) -> None:
    """Lets gRPC connect to `host` directly: it would ask a proxy for hosts of ours, and wait for it without end."""
    variable = "no_grpc_proxy"
    before = os.environ.get(variable) or os.environ.get("no_proxy")
    os.environ[variable] = f"{before},{host}" if before else host


def hold_aborts(for_ever: bool) -> None:
    """Delays SIGABRT, by which JAX's client ends a process as soon as a service is lost.

    JAX's `missed_heartbeat_callback` cannot be used instead: in jaxlib 0.10.2 a callback in Python fails with
    std::bad_cast. The thread that aborts waits in the signal handler, which is a function of libc, while our watch
    thread says which process was lost and leaves.

    Args:
      for_ever: true while processes meet, and may outlive a service; else for 6 s, so that other aborts end the
        process, too, after they have shown their stacks.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    wait = libc.pause if for_ever else libc.sleep  # called with the signal's number: sleep(6)
    faulthandler.disable()
    libc.signal(signal.SIGABRT, ctypes.cast(wait, ctypes.c_void_p))
    if not for_ever:
        faulthandler.enable()  # hands on to the handler that was there before


def initialize_jax(address: str, bind: str, count: int, index: int, timeout: int, heartbeat: int) -> None:
    """Starts `jax.distributed`.

    Args:
      address: of JAX's own service in process 0.
      bind: the same, as an address of this machine.
      timeout: seconds to wait for all processes.
      heartbeat: seconds, of our own watch; JAX gets three times as much, since it aborts without naming a host.
    """
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which preemption.py handles
    jax.config.update("jax_check_proxy_envs", False)  # see bypass_proxies
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    is_slurm = "SLURM_STEP_TASKS_PER_NODE" in os.environ and not os.environ.get("JAX_LOCAL_DEVICE_IDS")
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=count,
        process_id=index,
        local_device_ids=slurm.gpus_of_task(os.environ) if is_slurm else None,
        cluster_detection_method="deactivate" if is_slurm else None,  # see slurm.py
        coordinator_bind_address=bind,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=max(10, 3 * heartbeat),
        shutdown_timeout_seconds=max(10, 3 * heartbeat),
    )
