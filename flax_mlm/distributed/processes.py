"""Several processes as one run: they meet, watch each other, and leave together. One process is a group of one.

Process 0 listens on the coordinator's address; the others connect to it, and are checked against it before JAX
starts. The connections stay: over them every process says, five times per --heartbeat, how far it is, and says
goodbye when it leaves. So one that is killed, frozen or stuck ends all the others, with one line that names it,
before JAX's own service would notice and abort them. Process 0 passes on what it saw: all name the same one.

Only lines of JSON are exchanged, of 64 KiB at most. They are neither encrypted nor signed, and nor is what JAX
sends: run on a network that you trust. Process 0 listens on the coordinator's address and no other (JAX's service
too, on a free port), and closes connections that say anything else.
"""

import atexit
import contextlib
import dataclasses
import faulthandler
import json
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from flax_mlm.distributed import slurm
from flax_mlm.errors import PREEMPTED, Failure, Preempted, UserError

_MAX_LINE = 64 * 1024
_LINGER = 4.0  # seconds: for the others to hear why we leave, and for a stranger to say who it is
_HELLO = {"id": int, "count": int, "host": str, "pid": int, "identity": dict}

_Progress = tuple[str, int, float | None]  # doing what, after which step, since when (None: may take any time)
_Inbox = queue.SimpleQueue[tuple["_Link", dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """How the processes of one run find and watch each other; the defaults detect the cluster, or run one process.

    Attributes:
      coordinator: HOST:PORT of process 0; empty: from JAX_COORDINATOR_ADDRESS, or detected.
      num_processes: number of processes; 0: from JAX_NUM_PROCESSES, or detected.
      process_id: index of this process, from 0; -1: from JAX_PROCESS_ID, or detected.
      initialization_timeout: seconds to wait until all processes have connected.
      heartbeat: seconds without a heartbeat after which a process counts as lost.
      service_port: port of process 0 for JAX's own service; 0: any free one.
    """

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    initialization_timeout: int = 600
    heartbeat: int = 15
    service_port: int = 0


class Lost(Failure):
    """Another process is lost, or never came."""


@contextlib.contextmanager
def join(cluster: ClusterConfig, identity: dict[str, Any], stall_timeout: float) -> Iterator["ProcessGroup"]:
    """Meets the other processes, and starts `jax.distributed` where there are any; call before anything asks JAX for
    devices.

    Where they are comes from `cluster`, else from JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, else from what JAX detects (TPU slice, Slurm, Open MPI, Kubernetes: we
    wait on the port meant for JAX's service, which gets another); else there is one process.

    At the end of the block each process waits for all the others, as long as they live. An exception in the block
    ends all the others at once: with exit code 75 if it is SystemExit(75), else with 1.

    Args:
      cluster: addresses and timeouts.
      identity: what must be the same on all processes, name -> value.
      stall_timeout: seconds without progress on any process after which all are ended; 0.0 for never.

    Raises:
      UserError: these settings are wrong, or not the same on all processes.
      Lost: not all came within --initialization_timeout.
    """
    faulthandler.enable()  # JAX's service ends a process by SIGABRT: should it come first, show the stacks
    identity = {name: str(value) for name, value in identity.items()} | {"--heartbeat": str(cluster.heartbeat)}
    address, count, index = _resolve_cluster(cluster)
    if count == 1:
        group = ProcessGroup(cluster, 0, [socket.gethostname()], secrets.token_hex(8), "", [], queue.SimpleQueue())
    elif index == 0:
        group = _gather(cluster, address, count, identity)
    else:
        group = _attend(cluster, address, count, index, identity)
    threading.Thread(target=group._watch, args=(stall_timeout,), name="processes", daemon=True).start()
    try:
        if count > 1:  # alone it would be of no use, and JAX's service abort a computer that wakes up from sleep
            _start_jax(group)
        group.progress("starting")
        yield group
    except BaseException as e:
        if isinstance(e, Preempted) or (isinstance(e, SystemExit) and not e.code):
            group._finish()
        else:
            group._abandon(e)
        raise
    group._finish()


class _Link:
    """A connection that carries one JSON object a line, and what is known of the process at its other end."""

    def __init__(self, connection: socket.socket, inbox: _Inbox, id: int = -1):
        """A thread puts what comes into `inbox`, and "closed" after it: at its end, at nonsense, or if a stranger
        (whose `id` is -1) does not say who it is."""
        connection.settimeout(_LINGER if id < 0 else None)
        self.socket, self.id, self.name = connection, id, ""
        self.open, self.done, self.heard = True, False, time.monotonic()
        self.progress: _Progress = ("starting", 0, None)
        self.values: dict[str, str] = {}
        threading.Thread(target=self._read, args=(inbox,), daemon=True).start()

    def _read(self, inbox: _Inbox) -> None:
        with contextlib.suppress(OSError, ValueError, RecursionError), self.socket.makefile("rb") as lines:
            while line := lines.readline(_MAX_LINE):
                message = json.loads(line)
                if not isinstance(message, dict) or "kind" not in message:
                    break
                self.heard = time.monotonic()
                self.socket.settimeout(None)
                inbox.put((self, message))
        self.close()
        inbox.put((self, {"kind": "closed"}))

    def send(self, kind: str, **fields: Any) -> None:
        with contextlib.suppress(OSError):  # to read will tell that it is closed
            self.socket.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")

    def close(self) -> None:
        self.open = False
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class ProcessGroup:
    """The processes of this run, and the watch that this one keeps.

    Attributes:
      index, count: which process this is, and of how many.
      run_id: random, chosen by process 0.
      hosts: the host names of all, by index.
      lost_within: seconds within which the loss of a process has ended the others.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        index: int,
        hosts: list[str],
        run_id: str,
        service: str,
        links: list[_Link],
        inbox: _Inbox,
    ):
        """`service` is the address of JAX's own coordination service; "" where there is no other process."""
        self.cluster, self.lost_within = cluster, cluster.heartbeat + _LINGER
        self.index, self.count, self.run_id, self.hosts = index, len(hosts), run_id, hosts
        self.service, self._links, self._inbox = service, links, inbox
        self._name, self._done = f"process {index} ({hosts[index]})", False
        self._progress: _Progress = ("starting", 0, None)
        self._ending = threading.Lock()
        self._at_leave: list[Callable[[], None]] = []

    def progress(self, doing: str, step: int = 0) -> None:
        """The main loop goes on with `doing`, "waiting for a batch" say; `step` is the last finished one (0: as
        before). To be called at every step and phase; it costs nothing."""
        self._progress = (doing, step or self._progress[1], time.monotonic())

    @contextlib.contextmanager
    def untimed(self, doing: str) -> Iterator[None]:
        """Around what may take any time, such as a compilation: until `progress` is called, it counts as such."""
        before, _, since = self._progress
        self._progress = (doing, self._progress[1], None)
        try:
            yield
        finally:
            self._progress = (before, self._progress[1], None if since is None else time.monotonic())

    def check_same(self, name: str, value: str) -> None:
        """Compares what is known only after `join`. All processes call it, once for a name, and wait for each other.

        Raises:
          UserError: `value` differs between this process and process 0.
        """
        for link in self._links:
            link.send("value", name=name, value=value)
        _wait(lambda: all(name in link.values for link in self._links))
        for link in self._links:
            if link.values[name] != value:
                raise UserError(f"{name} is {link.values[name]} on {link.name} and {value} on {self._name}")

    def at_leave(self, action: Callable[[], None]) -> None:
        """`action` is called, in another thread, if the process ends without leaving the block of `join`."""
        self._at_leave.append(action)

    def leave(self, code: int, reason: str = "") -> NoReturn:
        """Ends this process at once, from any thread, and the others with it. `reason`, one line, is its last one on
        stderr, and they say it too."""
        self._tell("end", code, self._left(code, reason))
        _exit(code, reason, self._at_leave)

    def _left(self, code: int, reason: str) -> str:
        how = "stopped after a preemption" if code == PREEMPTED else f"left with exit code {code}"
        return f"{self._name} {how}" + (f": {' '.join(reason.split())[:1000]}" if reason else "")

    def _finish(self) -> None:
        """Waits until all have finished, process 0 last: JAX's service lives in it."""
        import jax

        self._done = True
        if self.index == 0:
            _wait(self._all_done)
        for link in self._links:
            link.send("end", code=0, reason="")
        _wait(self._all_done)
        if self.count > 1:
            jax.distributed.shutdown()

    def _all_done(self) -> bool:
        return self._done and all(link.done for link in self._links)

    def _abandon(self, error: BaseException) -> None:
        """Tells the others of an exception that ends this process, and sees to it that it does end."""
        code, reason = 1, str(error)
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            code, reason = error.code, ""
        elif isinstance(error, UserError):
            code = 2
        elif not isinstance(error, Failure | SystemExit):
            reason = f"{type(error).__name__}: {error}"
        if self._links and code == 1 and (error.__cause__ or not isinstance(error, Failure | SystemExit)):
            time.sleep(1)  # a lost process makes collectives fail, and saves: let the watch be first, and name it
        self._tell("end", code, self._left(code, reason))

        def go() -> None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

        if self._links:  # at exit JAX would wait for the others, and so would threads that save; but they are gone
            atexit.register(go)
            timer = threading.Timer(_LINGER - 1, go)
            timer.daemon = True
            timer.start()

    def _tell(self, kind: str, code: int, reason: str) -> None:
        """Says goodbye, once: the thread that comes second waits here for the end of the process."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()
        for link in self._links:
            link.send(kind, code=code, reason=reason)
        if self.index == 0:  # JAX's service goes with us, and aborts who is still there
            _wait(lambda: not any(link.open for link in self._links), _LINGER)

    def _watch(self, stall_timeout: float) -> None:
        """The thread that listens to the others, and tells them how far we are."""
        heartbeat, due = self.cluster.heartbeat, time.monotonic()
        last = awake = float("-inf")
        while True:
            with contextlib.suppress(queue.Empty):
                self._hear(*self._inbox.get(timeout=max(0.0, due - time.monotonic())))
            now = time.monotonic()
            if now < due:
                continue
            if now - last > heartbeat / 2:  # we begin, or it is we who were frozen
                awake = now
            doing, step, since = self._progress
            for link in self._links:
                link.send("beat", doing=doing, step=step, still=None if since is None else now - since)
                link.heard = max(link.heard, awake)
                if now - link.heard > heartbeat and not self._all_done():
                    link.open = False
                    self._lose(f"{link.name} said nothing for {heartbeat} s (frozen, or cut off)", step)
            if stall_timeout and self.index == 0:
                self._judge(now, awake, stall_timeout)
            due, last = now + heartbeat / 5, now

    def _hear(self, link: _Link, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if link.id < 0:
            if _is_hello(message):
                mine = f"--process_id={message['id']} is taken: the run of {self._name} has all its processes"
                link.send("refused", reason=f"{mine}; was this one started twice?")
            link.close()
        elif kind == "beat":
            still = message["still"]
            link.progress = (message["doing"], message["step"], None if still is None else link.heard - still)
        elif kind == "value":
            link.values[message["name"]] = message["value"]
        elif kind == "end" and message["code"] == 0:
            link.done = True
        elif kind in ("end", "lost"):
            self._end(kind, message["code"], message["reason"])
        elif kind == "closed" and not self._all_done():
            self._lose(f"{link.name} is gone (killed, or its machine is lost)", self._progress[1])

    def _judge(self, now: float, awake: float, stall_timeout: float) -> None:
        """Ends the run if no process moves. All wait for the one that is stuck: so it is among the hindmost."""
        everyone = [(self._done, self._name, self._progress), *((x.done, x.name, x.progress) for x in self._links)]
        timed = sorted((step, since or now, name, doing) for done, name, (doing, step, since) in everyone if not done)
        still = now - max([awake, *(since for _, since, *_ in timed)]) if timed else 0.0
        if still > stall_timeout:
            stuck = [f"{name} is stuck while {doing}" for step, _, name, doing in timed if step == timed[0][0]]
            more = f", {len(stuck) - 3} more" if len(stuck) > 3 else ""
            who = f": {', '.join(stuck[:3])}{more}" if self.count > 1 else f" while {timed[0][3]}"
            self._lose(f"no progress for {still:.0f} s{who},", timed[0][0])

    def _lose(self, what: str, step: int) -> None:
        self._end("lost", 1, f"{what} {f'after step {step}' if step else 'before the first step'}; thread stacks above")

    def _end(self, kind: str, code: int, reason: str) -> NoReturn:
        self._tell(kind, code, reason)
        _exit(PREEMPTED if code == PREEMPTED else 1, reason, self._at_leave, stacks=kind == "lost")


def _resolve_cluster(cluster: ClusterConfig) -> tuple[str, int, int]:
    """Address of process 0 ("" if there is no other), number of processes, and which one this is.

    Raises:
      UserError: they are incomplete, or make no sense.
    """
    address: str | None = cluster.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    count = cluster.num_processes or _number("JAX_NUM_PROCESSES")
    index = cluster.process_id if cluster.process_id >= 0 else _number("JAX_PROCESS_ID")
    if count != 1 and (address is None or count is None or index is None):
        from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize would ask

        try:
            address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
                address, count, index, [], None, cluster.initialization_timeout
            )
        except Exception as e:
            raise UserError(
                f"the settings of this cluster cannot be read ({type(e).__name__}: {e}); give --coordinator, "
                "--num_processes and --process_id, or --num_processes=1"
            ) from e
    if count == 1 and index:
        raise UserError(_out_of_range(index, count))
    if count == 1 or (address is None and count is None and index is None):
        return "", 1, 0
    if address is None or count is None or index is None:
        raise UserError("several processes need all of --coordinator, --num_processes and --process_id")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is '{address}'; it takes HOST:PORT of process 0")
    return address, count, index


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text and not text.isdecimal():
        raise UserError(f"{variable} is '{text}'; it takes a whole number")
    return int(text) if text else None


def _gather(cluster: ClusterConfig, address: str, count: int, identity: dict[str, str]) -> ProcessGroup:
    """Process 0: waits until the others have come, and checks that they fit.

    Raises:
      UserError: they do not, or `address` is not of this machine.
      Lost: some did not come.
    """
    host, _, port = address.rpartition(":")
    try:
        family, *_, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(where, family=family)
    except OSError as e:
        raise UserError(f"--coordinator={address}: process 0 cannot listen there: {e.strerror}") from e
    service = _service_address(str(where[0]), cluster.service_port)
    inbox: _Inbox = queue.SimpleQueue()
    threading.Thread(target=_accept, args=(listener, inbox), daemon=True).start()
    hosts, expected, mistake = [socket.gethostname()] * count, count, ""
    come: list[_Link] = []
    here = ", which only this machine can reach" if str(where[0]).startswith(("127.", "::1")) else ""
    print(f"host 1 of {count} joined: {hosts[0]} ({os.getpid()}); it waits at {where[0]}:{port}{here}", flush=True)
    end = time.monotonic() + cluster.initialization_timeout
    while len(come) < expected - 1:
        try:
            link, message = inbox.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        if link.id >= 0 or not _is_hello(message):  # it has gone again, or is none of us
            link.close()
            come = [other for other in come if other is not link]
            continue
        link.id, link.name = message["id"], f"process {message['id']} ({message['host']})"
        found = _mistake(link, message, come, f"process 0 ({hosts[0]})", count, identity)
        come.append(link)
        if not (found or mistake):
            hosts[link.id] = message["host"]
            print(f"host {len(come) + 1} of {count} joined: {message['host']} ({message['pid']})", flush=True)
        elif not mistake:  # wait for the others a little longer: they shall hear of it too
            mistake, end, expected = found, min(end, time.monotonic() + _LINGER), max(count, message["count"])
    missing = [str(i) for i in range(1, count) if i not in [link.id for link in come]]
    if mistake or missing:
        names = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        reason = mistake or f"process {names} of {count} did not come within {cluster.initialization_timeout} s"
        for link in come:
            link.send("refused" if mistake else "lost", reason=reason)
        raise UserError(reason) if mistake else Lost(reason)
    group = ProcessGroup(cluster, 0, hosts, secrets.token_hex(8), service, come, inbox)
    for link in come:
        link.send("start", run_id=group.run_id, hosts=hosts, service=group.service)
    return group


def _accept(listener: socket.socket, inbox: _Inbox) -> None:
    while True:
        try:
            _Link(listener.accept()[0], inbox)
        except OSError:  # the stranger has gone again, or there are too many
            time.sleep(0.1)


def _is_hello(message: dict[str, Any]) -> bool:
    fits = message["kind"] == "hello" and all(type(message.get(name)) is kind for name, kind in _HELLO.items())
    return fits and message["id"] >= 0 and message["host"].isprintable()


def _mistake(
    link: _Link, hello: dict[str, Any], come: list[_Link], me: str, count: int, identity: dict[str, str]
) -> str:
    """Why the process that says `hello` cannot take part; "" if it can."""
    if hello["count"] != count:
        return f"--num_processes is {hello['count']} on {link.name} and {count} on {me}"
    if not 0 < link.id < count:
        return _out_of_range(link.id, count, f" on {link.name}")
    for other in come:
        if other.id == link.id:
            return f"--process_id={link.id} is given twice: to {other.name} and to {link.name}"
    theirs = hello["identity"]
    differing = [name for name in sorted({*identity, *theirs}) if identity.get(name) != theirs.get(name)]
    values = "; ".join(
        f"{name} is {str(theirs.get(name))[:100]} on {link.name} and {str(identity.get(name))[:100]} on {me}"
        for name in differing[:3]
    )
    return values + (f"; and {len(differing) - 3} more differ" if len(differing) > 3 else "")


def _out_of_range(index: int, count: int, whose: str = "") -> str:
    return f"--process_id is {index}{whose}; with --num_processes={count} it takes 0 to {count - 1}"


def _attend(cluster: ClusterConfig, address: str, count: int, index: int, identity: dict[str, str]) -> ProcessGroup:
    """Another process: calls process 0 until it answers.

    Raises:
      UserError: it answers that we do not fit.
      Lost: it does not answer, or others did not come.
    """
    host, _, port = address.rpartition(":")
    hello = {"id": index, "count": count, "host": socket.gethostname(), "pid": os.getpid(), "identity": identity}
    timeout, possible = (
        cluster.initialization_timeout,
        index < count,
    )  # if not, process 0 shall hear of it if it is there already
    end = time.monotonic() + (timeout if possible else min(timeout, _LINGER))
    while time.monotonic() < end:
        time.sleep(0.1)
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
        except OSError:
            continue
        if connection.getsockname() == connection.getpeername():  # Linux connects a free port to itself, rarely
            connection.close()
            continue
        inbox: _Inbox = queue.SimpleQueue()
        link = _Link(connection, inbox, id=0)
        link.send("hello", **hello)
        with contextlib.suppress(queue.Empty):
            # It answers when it has waited long enough for the others, and it may have started after us.
            _, message = inbox.get(timeout=timeout + _LINGER)
            if message["kind"] == "start":
                link.name = f"process 0 ({message['hosts'][0]})"
                hosts, run_id, service = message["hosts"], message["run_id"], message["service"]
                return ProcessGroup(cluster, index, hosts, run_id, service, [link], inbox)
            if message["kind"] in ("refused", "lost"):
                raise (UserError if message["kind"] == "refused" else Lost)(message["reason"])
        link.close()
    if not possible:
        raise UserError(_out_of_range(index, count))
    raise Lost(f"no coordinator at {address} after {timeout} s; is process 0 running, and is the address right?")


def _start_jax(group: ProcessGroup) -> None:
    import jax

    ip = group.service.rpartition(":")[0].strip("[]")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which is ours (preemption.py)
    jax.config.update("jax_check_proxy_envs", False)  # gRPC would ask a proxy for our own hosts, for ever; unless:
    direct = "no_grpc_proxy"
    before = os.environ.get(direct) or os.environ.get("no_proxy")
    os.environ[direct] = f"{before},{ip}" if before else ip
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    is_slurm = "SLURM_STEP_TASKS_PER_NODE" in os.environ and not os.environ.get("JAX_LOCAL_DEVICE_IDS")
    jax.distributed.initialize(
        coordinator_address=group.service,
        num_processes=group.count,
        process_id=group.index,
        local_device_ids=slurm.gpus_of_task(os.environ) if is_slurm else None,
        cluster_detection_method="deactivate" if is_slurm else None,  # see slurm.py
        coordinator_bind_address=group.service,
        initialization_timeout=group.cluster.initialization_timeout,
        heartbeat_timeout_seconds=2 * group.cluster.heartbeat,  # it aborts without naming anyone: ours comes first
        shutdown_timeout_seconds=2 * group.cluster.heartbeat,  # all have finished by then
    )


def _service_address(ip: str, port: int) -> str:
    """`ip` with the port for JAX's service, which nobody uses yet.

    Raises:
      UserError: somebody does.
    """
    try:
        with socket.create_server((ip, port), family=socket.AF_INET6 if ":" in ip else socket.AF_INET) as server:
            port = server.getsockname()[1]
    except OSError as e:
        raise UserError(f"--service_port={port}: process 0 cannot listen there: {e.strerror}") from e
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def _wait(condition: Callable[[], bool], seconds: float = float("inf")) -> None:
    """Waits for what other threads will see."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def _exit(code: int, reason: str = "", actions: Sequence[Callable[[], None]] = (), stacks: bool = False) -> NoReturn:
    """Ends this process; `reason` is its last line."""
    # Come what may: a full pipe, a dead disk, a thread that keeps the GIL.
    faulthandler.dump_traceback_later(2 * _LINGER, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for action in (sys.stdout.flush, *actions):
        thread = threading.Thread(target=action, daemon=True)
        thread.start()
        thread.join(_LINGER)
    if stacks:
        faulthandler.dump_traceback(all_threads=True)
    if reason:
        print(f"stopped: {reason}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)
