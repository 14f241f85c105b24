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

from flax_mlm.distributed import cluster
from flax_mlm.errors import UserError

_LONG = 10**6  # seconds, more than a run takes: JAX would abort the process when the time is up


class Unreachable(Exception):
    """The store gave no answer, or an error."""


class Store:
    """Key-value store of strings that all processes of a run share; process 0 serves it."""

    def __init__(self, client: Any, patience: float):
        """`patience`: seconds to wait for the answer to a request."""
        self._client = client
        self._patience = patience
        self._service: Any = None

    @classmethod
    def serve(cls, address: str, patience: float) -> Self:
        """Starts the store in this process, at an IP:PORT from `check_free`."""
        from jaxlib import _jax

        # A recoverable service accepts any number of clients for its only node, so that none has to wait for others.
        start = _jax.get_distributed_runtime_service
        service = start(address, 1, heartbeat_timeout=_LONG, shutdown_timeout=1, recoverable=True)
        store = cls.connect(address, _LONG, patience)
        store._service = service
        return store

    @classmethod
    def connect(cls, address: str, timeout: float, patience: float) -> Self:
        """Connects to the store at HOST:PORT. Raises Unreachable if there is none within `timeout` seconds."""
        from jaxlib import _jax

        _bypass_proxies(address)
        client = _jax.get_distributed_runtime_client(
            address, 0, init_timeout=_LONG, heartbeat_timeout=_LONG, shutdown_on_destruction=False, use_compression=True
        )
        _call(client.connect, timeout)
        return cls(client, patience)

    def set(self, key: str, value: str) -> None:
        """Sets or overwrites a key. Raises Unreachable."""
        _call(lambda: self._client.key_value_set(key, value, True), self._patience)

    def set_first(self, key: str, value: str) -> str:
        """Sets a key unless another process has done so, and returns its value. Raises Unreachable."""

        def request() -> str:
            with contextlib.suppress(Exception):  # it is set already; if JAX's service is gone, so the next line says
                self._client.key_value_set(key, value, False)
            return self._client.key_value_try_get(key)

        return _call(request, self._patience)

    def read(self, folder: str) -> dict[str, str]:
        """Reads all keys below `folder`, which ends in a slash, with their values. Raises Unreachable."""
        return dict(_call(lambda: self._client.key_value_dir_get(folder), self._patience))

    def close(self) -> None:
        """Disconnects, and ends the store where it is served."""
        with contextlib.suppress(Unreachable):
            _call(self._client.shutdown, self._patience)
        if self._service:
            self._service.shutdown()


def _call(request: Callable[[], Any], timeout: float) -> Any:
    """Calls `request` in a thread that may be given up: JAX waits without end for a process that is frozen."""
    answers = queue.SimpleQueue[Any]()

    def answer() -> None:
        try:
            answers.put(request())
        except Exception as e:
            answers.put(e)

    try:
        threading.Thread(target=answer, name="store", daemon=True).start()
        result = answers.get(timeout=timeout)
    except (queue.Empty, RuntimeError) as e:  # or the system has no more threads
        raise Unreachable(f"no answer within {timeout} s") from e
    if isinstance(result, Exception):
        raise Unreachable(str(result)) from result
    return result


def check_free(address: str) -> str:
    """Returns IP:PORT of this machine for HOST:PORT; gRPC itself would share a port with another process, and crash
    at the address of another machine.

    Raises:
      UserError: the address belongs to another machine, or the port is in use.
    """
    host, _, port = address.rpartition(":")
    try:
        family, kind, _, _, (ip, *more) = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((ip, *more))
    except OSError as e:
        raise UserError(f"--coordinator={address}: process 0 cannot listen there: {e.strerror}") from e
    return f"[{ip}]:{port}" if family == socket.AF_INET6 else f"{ip}:{port}"


def _bypass_proxies(address: str) -> None:
    """Lets gRPC connect to `address` directly: it would ask a proxy for hosts of ours, and wait for it without end."""
    variable = "no_grpc_proxy"
    before = os.environ.get(variable) or os.environ.get("no_proxy") or ""
    if (host := address.rpartition(":")[0].strip("[]")) not in before.split(","):
        os.environ[variable] = f"{before},{host}".lstrip(",")


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


def initialize_jax(address: str, count: int, index: int, timeout: int, heartbeat: int) -> None:
    """Starts `jax.distributed`.

    Args:
      address: HOST:PORT of JAX's own service in process 0.
      timeout: seconds to wait for all processes.
      heartbeat: seconds, of our own watch; JAX gets three times as much, since it aborts without naming a host.
    """
    import jax

    _bypass_proxies(address)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which preemption.py handles
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    is_slurm = "SLURM_STEP_TASKS_PER_NODE" in os.environ and not os.environ.get("JAX_LOCAL_DEVICE_IDS")
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=count,
        process_id=index,
        local_device_ids=cluster.slurm_gpus(os.environ) if is_slurm else None,
        cluster_detection_method="deactivate" if is_slurm else None,  # it would take only one GPU
        coordinator_bind_address=check_free(address) if index == 0 else None,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=max(10, 3 * heartbeat),
        shutdown_timeout_seconds=max(10, 3 * heartbeat),
    )


def gather(name: str, value: str, count: int, index: int) -> list[str]:
    """Exchanges the values of all processes, by index. Needs `initialize_jax`; `name` is used only once."""
    from jax._src.distributed import global_state

    client: Any = global_state.client
    client.key_value_set(f"flax_mlm/{name}/{index}", value)
    return [client.blocking_key_value_get(f"flax_mlm/{name}/{i}", 1000 * _LONG) for i in range(count)]


def wait_for_all(name: str) -> None:
    """Waits until all processes have called this with the same `name`, which is used only once."""
    from jax._src.distributed import global_state

    client: Any = global_state.client
    client.wait_at_barrier(f"flax_mlm/{name}", 1000 * _LONG)
