"""How the processes of a run meet in the store of process 0, and check that they belong together.

Process I writes what it knows of itself to hello/I/TOKEN, again and again: an entry that no longer changes belongs to
a process that is gone, and two that change belong to two processes of one number. Process 0 writes one answer.
"""

import itertools
import json
import os
import secrets
import socket
import time
from typing import Any, NamedTuple, NoReturn

from flax_mlm.distributed import coordination
from flax_mlm.distributed.cluster import ClusterConfig, out_of_range
from flax_mlm.distributed.coordination import Store, Unreachable
from flax_mlm.errors import Failure, UserError

LINGER = 4.0  # seconds for the others to hear why a process leaves
_POLL = 0.1  # seconds between two requests to the store
_STALE = 3.0  # seconds without a change after which an entry belongs to a process that is gone


class Lost(Failure):
    """Another process is lost, or never came."""


class Meeting(NamedTuple):
    """Outcome of `meet`.

    Attributes:
      store: shared by all processes.
      run_id: random, the same on all processes.
      hosts: host names, by index.
      jax_address: where JAX's own service listens, for others and as an address of process 0.
    """

    store: Store
    run_id: str
    hosts: list[str]
    jax_address: tuple[str, str]


def meet(cluster: ClusterConfig, address: str, count: int, index: int, identity: dict[str, str]) -> Meeting:
    """Waits for all processes.

    Args:
      address: HOST:PORT of process 0.
      count: number of processes, at least 2.
      index: of this process.
      identity: names and values that must be the same on all processes.

    Raises:
      UserError: the processes do not fit together, or process 0 cannot listen at `address`.
      Lost: not all came within `cluster.initialization_timeout`.
    """
    host, port = coordination.split_address(address)
    coordination.bypass_proxies(host)
    coordination.hold_aborts(for_ever=True)
    next_port = port + 1 if port < 2**16 - 1 else port - 1
    own_address, bind = "", ""
    if index == 0:
        own_address, bind = coordination.check_free(host, port), coordination.check_free(host, next_port)
        coordination.bypass_proxies(coordination.split_address(own_address)[0])
        meeting = _gather(cluster, own_address, count, identity)
    else:
        meeting = _attend(cluster, address, count, index, identity)
    return meeting._replace(jax_address=(coordination.join_address(host, next_port), bind))


class _Guest:
    """A process that has written to the store: its latest entry, and the times of its first and its latest one."""

    def __init__(self, hello: dict[str, Any]):
        self.hello = hello
        self.id = hello["id"]
        self.name = f"process {hello['id']} ({hello['host']})"
        self.first = self.changed = time.monotonic()

    def update(self, hello: dict[str, Any]) -> None:
        if hello["beat"] != self.hello["beat"]:
            self.changed = time.monotonic()
        self.hello = hello


class _Guests:
    """All processes that have written to the store, by token, without those that are gone again."""

    def __init__(self, store: Store):
        self.store = store
        self.by_token: dict[str, _Guest] = {}

    def refresh(self) -> list[_Guest]:
        """Reads the store, and returns the new ones."""
        entries = {key.split("/")[-1]: json.loads(text) for key, text in self.store.read("hello/").items()}
        for token, guest in self.by_token.items():
            if token in entries:
                guest.update(entries[token])
        new = {token: _Guest(hello) for token, hello in entries.items() if token not in self.by_token}
        self.by_token |= new
        return list(new.values())

    def present(self) -> dict[str, _Guest]:
        """Returns those that still write, by token."""
        now = time.monotonic()
        return {token: guest for token, guest in self.by_token.items() if now - guest.changed < _STALE}


def _gather(cluster: ClusterConfig, address: str, count: int, identity: dict[str, str]) -> Meeting:
    """Process 0: serves the store, and waits until all the others fit."""
    store = Store.serve(address, cluster.heartbeat)
    host, guests, mistake, expected = socket.gethostname(), _Guests(store), "", count
    is_local = address.startswith(("127.", "[::1]"))
    reach = ", which only this machine can reach" if is_local else ""
    print(f"host 1 of {count} joined: {host} ({os.getpid()}); it waits at {address}{reach}", flush=True)
    end = time.monotonic() + cluster.initialization_timeout
    while time.monotonic() < end:
        for guest in guests.refresh():
            mistake = mistake or _mistake(guest, f"process 0 ({host})", count, identity)
            expected = max(expected, guest.hello["count"])
            if not mistake:
                arrived = 1 + len({other.id for other in guests.present().values()})
                print(f"host {arrived} of {count} joined: {guest.hello['host']} ({guest.hello['pid']})", flush=True)
        present = guests.present()
        mistake = mistake or _duplicate(list(present.values()))
        if mistake:  # wait a little longer for the others, so that they hear of it too
            end = min(end, time.monotonic() + LINGER)
        if len(present) >= expected - 1 if mistake else sorted(g.id for g in present.values()) == [*range(1, count)]:
            break
        time.sleep(_POLL)
    present = guests.present()
    missing = [str(i) for i in range(1, count) if i not in [guest.id for guest in present.values()]]
    if mistake or missing:
        names = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        lost = f"process {names} of {count} did not come within {cluster.initialization_timeout} s"
        _refuse(guests, UserError(mistake) if mistake else Lost(lost))
    hosts = [host, *(guest.hello["host"] for guest in sorted(present.values(), key=lambda guest: guest.id))]
    run_id = secrets.token_hex(8)
    store.set("answer/0", json.dumps({"kind": "start", "run_id": run_id, "hosts": hosts, "tokens": list(present)}))
    return Meeting(store, run_id, hosts, ("", ""))


def _refuse(guests: _Guests, error: UserError | Lost) -> NoReturn:
    """Raises `error` here and in all processes that are there, which remove their entries when they have read it."""
    kind = "refused" if isinstance(error, UserError) else "lost"
    guests.store.set("answer/0", json.dumps({"kind": kind, "reason": str(error)}))
    end = time.monotonic() + LINGER
    while guests.store.read("hello/") and guests.present() and time.monotonic() < end:
        guests.refresh()
        time.sleep(_POLL)
    time.sleep(_POLL)  # for the last one to disconnect
    raise error


def _mistake(guest: _Guest, me: str, count: int, identity: dict[str, str]) -> str:
    """Explains why `guest` cannot take part; empty if it can."""
    if guest.hello["count"] != count:
        return f"--num_processes is {guest.hello['count']} on {guest.name} and {count} on {me}"
    if not 0 < guest.id < count:
        return out_of_range(guest.id, count, f" on {guest.name}")
    theirs = guest.hello["identity"]
    differing = [name for name in sorted({*identity, *theirs}) if identity.get(name) != theirs.get(name)]
    values = "; ".join(
        f"{name} is {str(theirs.get(name))[:100]} on {guest.name} and {str(identity.get(name))[:100]} on {me}"
        for name in differing[:3]
    )
    return values + (f"; and {len(differing) - 3} more differ" if len(differing) > 3 else "")


def _duplicate(guests: list[_Guest]) -> str:
    """Reports an index that two living processes share; empty if there is none."""
    for one, other in itertools.combinations(guests, 2):
        if one.id == other.id and min(one.changed, other.changed) > max(one.first, other.first):
            return f"--process_id={one.id} is given twice: to {one.name} and to {other.name}"
    return ""


def _attend(cluster: ClusterConfig, address: str, count: int, index: int, identity: dict[str, str]) -> Meeting:
    """Any other process: connects to the store, again if process 0 is started again, and waits for the answer."""
    is_possible = index < count  # if not, process 0 is told if it is there already
    hello = {"id": index, "count": count, "host": socket.gethostname(), "pid": os.getpid(), "identity": identity}
    token = secrets.token_hex(8)
    timeout = cluster.initialization_timeout
    end = time.monotonic() + (timeout if is_possible else min(timeout, LINGER))
    while (left := end - time.monotonic()) > 0 and (store := Store.connect(address, left, cluster.heartbeat)):
        try:
            # Process 0 answers when it has waited long enough for the others, and it may have started after us.
            answer = _await_answer(store, f"hello/{index}/{token}", hello, timeout + LINGER)
        except Unreachable:
            time.sleep(_POLL)
            continue
        if answer["kind"] == "start" and token in answer["tokens"]:
            return Meeting(store, answer["run_id"], answer["hosts"], ("", ""))
        store.close()  # else JAX writes an error of its own when process 0 ends
        if answer["kind"] == "start":
            whole = f"the run of process 0 ({answer['hosts'][0]}) has all its processes"
            raise UserError(f"--process_id={index} is taken: {whole}; was this one started twice?")
        raise (UserError if answer["kind"] == "refused" else Lost)(answer["reason"])
    if not is_possible:
        raise UserError(out_of_range(index, count))
    raise Lost(f"no coordinator at {address} after {timeout} s; is process 0 running, and is the address right?")


def _await_answer(store: Store, key: str, hello: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Repeats `hello` until process 0 answers.

    Raises:
      Unreachable: process 0 is gone, or gives no answer.
    """
    end = time.monotonic() + timeout
    for beat in itertools.count():
        store.set(key, json.dumps({**hello, "beat": beat}))
        if answers := store.read("answer/"):
            store.delete(key)
            return json.loads(next(iter(answers.values())))
        if time.monotonic() > end:
            raise Unreachable(f"no answer within {timeout} s")
        time.sleep(_POLL)
    raise AssertionError
