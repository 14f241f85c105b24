"""How the processes of a run meet in the store of process 0, and check that they belong together.

Each process writes what it knows of itself to hello/TOKEN, again and again: an entry that no longer changes belongs to
a process that is gone, and two that change belong to two processes of one number. Process 0 writes one answer.
"""

import contextlib
import itertools
import json
import os
import secrets
import socket
import time
from typing import Any

from flax_mlm.distributed import coordination
from flax_mlm.distributed.cluster import ClusterConfig, out_of_range
from flax_mlm.distributed.coordination import Store, Unreachable
from flax_mlm.errors import Failure, UserError

LINGER = 4.0  # seconds for the others to hear why a process leaves
_POLL = 0.1  # seconds between two requests to the store
_STALE = 3.0  # seconds without a change after which an entry belongs to a process that is gone


# The store that all processes share; the run_id, random and the same on all of them; their host names, by index; the
# address where process 0 is to serve `jax.distributed`.
Meeting = tuple[Store, str, list[str], str]


class Lost(Failure):
    """Another process is lost, or never came."""


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
    coordination.hold_aborts(for_ever=True)
    me = {"id": index, "count": count, "host": socket.gethostname(), "pid": os.getpid(), "identity": identity}
    store, answer = _gather(cluster, address, me) if index == 0 else _attend(cluster, address, me)
    return store, answer["run_id"], answer["hosts"], _next_port(address)


def free_port() -> int:
    """A port where process 0 can listen, as on the next one, in a run on this machine alone.

    Outgoing connections do not take them while the run starts: on Linux they get 32768 and up.
    """
    while True:
        port = secrets.choice(range(10_000, 32_000, 2))
        with contextlib.suppress(UserError):
            _check_ports(f"127.0.0.1:{port}")
            return port


def _check_ports(address: str) -> str:
    """Returns IP:PORT of process 0. Raises UserError where it cannot listen there and on the next port."""
    own_address, _ = coordination.check_free(address), coordination.check_free(_next_port(address))
    return own_address


def _next_port(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + (1 if int(port) < 2**16 - 1 else -1)}"


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


def _gather(cluster: ClusterConfig, address: str, me: dict[str, Any]) -> tuple[Store, dict[str, Any]]:
    """Serves the store, and waits until all the others fit. Runs in process 0."""
    own_address = _check_ports(address)
    store = Store.serve(own_address, cluster.heartbeat)
    count, timeout = me["count"], cluster.initialization_timeout
    reach = ", which only this machine can reach" if own_address.startswith(("127.", "[::1]")) else ""
    print(f"host 1 of {count} joined: {me['host']} ({me['pid']}); it waits at {own_address}{reach}", flush=True)
    guests: dict[str, _Guest] = {}
    present: dict[str, _Guest] = {}
    mistake, missing, end = "", {*range(1, count)}, time.monotonic() + timeout
    while time.monotonic() < end and (missing or mistake or len(present) >= count):
        time.sleep(_POLL)
        hellos = {key.split("/")[-1]: json.loads(text) for key, text in store.read("hello/").items()}
        new = {token: _Guest(hello) for token, hello in hellos.items() if token not in guests}
        guests |= new
        for token, hello in hellos.items():
            guests[token].update(hello)
        present = {token: guest for token, guest in guests.items() if time.monotonic() - guest.changed < _STALE}
        missing = {*range(1, count)} - {guest.id for guest in present.values()}
        if not mistake and (mistake := _mistake([*present.values()], me)):
            end = min(end, time.monotonic() + LINGER / 2)  # for the others, so that they hear of it too
        if not mistake:
            for guest in new.values():
                hello = guest.hello
                print(f"host {count - len(missing)} of {count} joined: {hello['host']} ({hello['pid']})", flush=True)
    if mistake or missing:
        names = ", ".join(map(str, sorted(missing)[:10]))
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        reason = mistake or f"process {names}{more} of {count} did not come within {timeout} s"
        answer = {"mistake": bool(mistake), "reason": reason}
        store.set("answer/0", json.dumps(answer))
        time.sleep(LINGER)
        raise _error(answer)
    by_id = sorted(present.values(), key=lambda guest: guest.id)
    hosts = [me["host"], *(guest.hello["host"] for guest in by_id)]
    answer = {"run_id": secrets.token_hex(8), "hosts": hosts, "tokens": list(present)}
    store.set("answer/0", json.dumps(answer))
    return store, answer


def _mistake(guests: list[_Guest], me: dict[str, Any]) -> str:
    """Explains why the processes do not fit together; empty if they do."""
    host = f"process 0 ({me['host']})"
    for guest in guests:
        if guest.hello["count"] != me["count"]:
            return f"--num_processes is {guest.hello['count']} on {guest.name} and {me['count']} on {host}"
        if not 0 < guest.id < me["count"]:
            return out_of_range(guest.id, me["count"], f" on {guest.name}")
        theirs, ours = guest.hello["identity"], me["identity"]
        differing = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        if differing:
            values = "; ".join(
                f"{name} is {str(theirs.get(name))[:100]} on {guest.name} and {str(ours.get(name))[:100]} on {host}"
                for name in differing[:3]
            )
            return values + (f"; and {len(differing) - 3} more differ" if len(differing) > 3 else "")
    for one, other in itertools.combinations(guests, 2):
        if one.id == other.id and min(one.changed, other.changed) > max(one.first, other.first):
            return f"--process_id={one.id} is given twice: to {one.name} and to {other.name}"
    return ""


def _attend(cluster: ClusterConfig, address: str, me: dict[str, Any]) -> tuple[Store, dict[str, Any]]:
    """Connects to the store, again if process 0 is started again, and waits for its answer. Runs in all the others."""
    is_possible = me["id"] < me["count"]  # if not, process 0 is told if it is there already
    timeout, token = cluster.initialization_timeout, secrets.token_hex(8)
    end = time.monotonic() + (timeout if is_possible else min(timeout, LINGER))
    while (left := end - time.monotonic()) > 0:
        try:
            store = Store.connect(address, left, cluster.heartbeat)
            # Process 0 answers when it has waited long enough for the others, and it may have started after us.
            answer = _await_answer(store, token, me, timeout + LINGER)
        except Unreachable:
            time.sleep(_POLL)
            continue
        if token in answer.get("tokens", []):
            return store, answer
        store.close()  # else JAX writes an error of its own when process 0 ends
        if "reason" in answer:
            raise _error(answer)
        whole = f"the run of process 0 ({answer['hosts'][0]}) has all its processes"
        raise UserError(f"--process_id={me['id']} is taken: {whole}; was this one started twice?")
    if not is_possible:
        raise UserError(out_of_range(me["id"], me["count"]))
    raise Lost(f"no coordinator at {address} after {timeout} s; is process 0 running, and is the address right?")


def _await_answer(store: Store, token: str, me: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Repeats the entry of this process until process 0 answers. Raises Unreachable: it is gone, or does not answer."""
    end = time.monotonic() + timeout
    for beat in itertools.takewhile(lambda _: time.monotonic() < end, itertools.count()):
        store.set(f"hello/{token}", json.dumps({**me, "beat": beat}))
        if answers := store.read("answer/"):
            return json.loads(answers["answer/0"])
        time.sleep(_POLL)
    raise Unreachable(f"no answer within {timeout} s")


def _error(answer: dict[str, Any]) -> UserError | Lost:
    return UserError(answer["reason"]) if answer["mistake"] else Lost(answer["reason"])
