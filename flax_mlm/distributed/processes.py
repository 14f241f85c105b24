"""Several processes as one run: they meet, watch each other, and leave together. One process is a group of one.

Each process writes five times per heartbeat to the store of process 0 how far it is, and reads what the others wrote.
So the loss of one ends all the others, with one line that names it, before JAX's own service would abort them. Who
leaves first writes why; the others read it, and so all name the same process.

What the processes write is neither encrypted nor signed, like everything that JAX sends: run on a trusted network.
"""

import atexit
import contextlib
import faulthandler
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from flax_mlm.distributed import coordination, watch
from flax_mlm.distributed.cluster import ClusterConfig, resolve
from flax_mlm.distributed.coordination import Store, Unreachable
from flax_mlm.distributed.rendezvous import LINGER, meet
from flax_mlm.errors import PREEMPTED, Failure, Preempted, UserError


@contextlib.contextmanager
def join(cluster: ClusterConfig, identity: dict[str, Any], stall_timeout: float) -> Iterator["ProcessGroup"]:
    """Meets the other processes, and starts `jax.distributed` if there are any; enter it before JAX starts a backend.

    At the end of the block each process waits for all the others, as long as they live. An exception in the block
    ends all the others: with exit code 75 if it is SystemExit(75), else with 1.

    Args:
      cluster: addresses and timeouts.
      identity: names and values that must be the same on all processes.
      stall_timeout: seconds without progress on any process after which all are ended; 0.0: never.

    Raises:
      UserError: the settings are wrong, or differ between processes.
      Lost: not all came within `cluster.initialization_timeout`.
    """
    address, count, index = resolve(cluster)
    hosts, run_id, store = [socket.gethostname()], secrets.token_hex(8), None
    if count > 1:
        values = {name: str(value) for name, value in identity.items()} | {"--heartbeat": str(cluster.heartbeat)}
        try:
            store, run_id, hosts, address = meet(cluster, address, count, index, values)
        except (UserError, Failure) as e:
            atexit.register(_kill, 2 if isinstance(e, UserError) else 1)
            raise
        coordination.hold_aborts(for_ever=False)
    group = ProcessGroup(index, hosts, run_id, store, cluster.heartbeat, stall_timeout)
    try:
        if count > 1:
            coordination.initialize_jax(address, count, index, cluster.initialization_timeout, cluster.heartbeat)
        group.progress("starting")
        yield group
    except BaseException as e:
        if isinstance(e, Preempted) or (isinstance(e, SystemExit) and not e.code):
            group.finish()
        else:
            group.abandon(e)
        raise
    group.finish()


class ProcessGroup:
    """The processes of a run.

    Attributes:
      index: which process this is, from 0.
      count: number of processes.
      run_id: random, chosen by process 0.
      hosts: host names, by index.
      lost_within: seconds within which the loss of a process has ended the others.
    """

    def __init__(
        self, index: int, hosts: list[str], run_id: str, store: Store | None, heartbeat: int, stall_timeout: float
    ):
        self.index = index
        self.count = len(hosts)
        self.run_id = run_id
        self.hosts = hosts
        self.lost_within = 1.5 * heartbeat + LINGER
        self._leaving = threading.Lock()
        self._at_leave: list[Callable[[], None]] = []
        self._watch = watch.Watch(index, hosts, store, heartbeat, stall_timeout, self._end)
        self._watch.start()

    def progress(self, doing: str, step: int = 0) -> None:
        """Notes that the main loop begins `doing`, such as "waiting for a batch", after `step` (0: as before). Called
        at every step and phase; it costs nothing."""
        me = self._watch.me
        me.doing = doing
        me.step = step or me.step
        me.since = time.monotonic()

    @property
    def doing(self) -> str:
        """The current phase of the main loop, as `progress` and `untimed` have named it."""
        return self._watch.me.doing

    @contextlib.contextmanager
    def untimed(self, doing: str) -> Iterator[None]:
        """Surrounds what may take any time, such as a compilation."""
        me = self._watch.me
        before, since = me.doing, me.since
        me.doing, me.since = doing, None
        try:
            yield
        finally:
            me.doing, me.since = before, None if since is None else time.monotonic()

    def check_same(self, name: str, value: str) -> None:
        """Compares a value that is known only after `join`. All processes call it, once per name.

        Raises:
          UserError: `value` differs between a process and process 0.
        """
        if self.count > 1:
            members, values = self._watch.members, coordination.gather(name, value, self.count, self.index)
            for member, theirs in zip(members, values, strict=True):
                if theirs != values[0]:
                    raise UserError(f"{name} is {theirs} on {member.name} and {values[0]} on {members[0].name}")

    def at_leave(self, action: Callable[[], None]) -> None:
        """Registers an action for the case that the process ends without leaving the block of `join`. Another thread
        calls it."""
        self._at_leave.append(action)

    def leave(self, code: int, reason: str = "") -> NoReturn:
        """Ends this process and all the others, from any thread. `reason` is one line, the last one on stderr."""
        self._announce("end", code, self._farewell(code, reason))
        _exit(code, reason, self._at_leave)

    def finish(self) -> None:
        """Waits until all have finished, and stops the watch."""
        watch = self._watch
        watch.me.done = True
        if self.count > 1:
            try:
                coordination.wait_for_all("finished")
                watch.wait_for_signs_of_life()  # one that had finished may be lost since
                coordination.wait_for_all("leaving")
            except Exception:  # JAX's service is gone: the watch finds out who is lost, and ends this process
                watch.wait_for_signs_of_life()
                raise
        watch.stop()
        watch.join()  # a thread that is inside of JAX aborts the interpreter when that ends
        if store := watch.store:
            import jax

            if self.index != 0:
                store.close()
            jax.distributed.shutdown()  # waits for all processes
            if self.index == 0:
                store.close()

    def abandon(self, error: BaseException) -> None:
        """Tells the others of an exception that ends this process, and sees to it that the process ends."""
        code, reason = error.code if isinstance(error, UserError | Failure) else 1, str(error)
        is_planned = isinstance(error, UserError | Failure | SystemExit)
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            code, reason = error.code, ""
        elif not is_planned:
            reason = f"{type(error).__name__}: {error}"
        if code == 1 and (error.__cause__ or not is_planned):
            # A lost process makes collectives and saves fail: the watch gets time to find out, and to name it.
            self._watch.wait_for_signs_of_life()
        self._announce("end", code, self._farewell(code, reason))
        self._watch.stop()

        if self.count > 1:  # at exit JAX would wait for the others, and so would threads that save
            atexit.register(_kill, code)
            timer = threading.Timer(LINGER - 1, _kill, [code])
            timer.daemon = True
            timer.start()

    def _farewell(self, code: int, reason: str) -> str:
        how = "stopped after a preemption" if code == PREEMPTED else f"left with exit code {code}"
        return f"{self._watch.me.name} {how}" + (f": {' '.join(reason.split())[:1000]}" if reason else "")

    def _announce(self, kind: str, code: int, reason: str) -> tuple[str, int, str]:
        """Writes why this process leaves, unless another has written first, and returns what holds for all. The
        thread that comes second waits here for the end of the process."""
        if not self._leaving.acquire(blocking=False):
            threading.Event().wait()
        end = (kind, code, reason)
        if store := self._watch.store:
            with contextlib.suppress(Unreachable):
                end = json.loads(store.set_first("run/end", json.dumps(end)))
                if self.index == 0:
                    time.sleep(LINGER)  # the others read it from the store of this process
        return end

    def _end(self, kind: str, code: int, reason: str) -> NoReturn:
        kind, code, reason = self._announce(kind, code, reason)
        _exit(PREEMPTED if code == PREEMPTED else 1, reason, self._at_leave, stacks=kind == "lost")


def _kill(code: int) -> NoReturn:
    """Ends this process although threads of JAX may be stuck, such as one that `hold_aborts` holds for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit(code: int, reason: str = "", actions: Sequence[Callable[[], None]] = (), stacks: bool = False) -> NoReturn:
    """Ends this process; `reason` is its last line."""
    # In spite of a full pipe, a dead disk, or a thread that keeps the GIL.
    faulthandler.dump_traceback_later(2 * LINGER, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for action in (sys.stdout.flush, *actions):
        thread = threading.Thread(target=action, daemon=True)
        thread.start()
        thread.join(LINGER)
    if stacks:
        faulthandler.dump_traceback(all_threads=True)
    if reason:
        print(f"stopped: {reason}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)
