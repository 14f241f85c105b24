"""Heartbeats of the processes of a run: who is there, how far each is, which one is lost or stuck."""

import json
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from flax_mlm.distributed.coordination import Store, Unreachable

_IN_FLIGHT = 3  # heartbeats of a process that may still arrive when it is gone: written, on their way, or both


class Member:
    """State of one process, as its last heartbeat gave it.

    Attributes:
      name: index and host.
      beats: number of heartbeats so far.
      heard: when the last one arrived, by the clock of this process.
      doing: current phase of the main loop.
      step: last finished step.
      since: start of that phase; None: it may take any time.
      done: true after the last step.
      left: true when it sends no more heartbeats, in agreement with all.
      values: see `ProcessGroup.check_same`.
    """

    def __init__(self, index: int, host: str):
        self.name = f"process {index} ({host})"
        self.beats = 0
        self.heard = time.monotonic()
        self.doing = "starting"
        self.step = 0
        self.since: float | None = None
        self.done = False
        self.left = False
        self.values: dict[str, str] = {}

    def to_json(self) -> str:
        """Encodes a heartbeat, with the age of the phase instead of its start: clocks differ."""
        age = None if self.since is None else time.monotonic() - self.since
        return json.dumps([self.beats, self.doing, self.step, age, self.done, self.left, self.values])

    def update(self, heartbeat: str) -> None:
        """Takes over a heartbeat of another process, if it is new."""
        beats, self.doing, self.step, age, self.done, self.left, self.values = json.loads(heartbeat)
        if beats != self.beats:
            self.beats = beats
            self.heard = time.monotonic()
            self.since = None if age is None else self.heard - age


class Watch:
    """Thread that exchanges heartbeats through the store, and ends the process when another is lost or stuck.

    Attributes:
      members: all processes, by index.
      me: this process; its attributes may be set from any thread.
      others: all processes but this one.
      store: of the run; None for a single process, or when it is lost.
    """

    def __init__(
        self,
        index: int,
        hosts: list[str],
        store: Store | None,
        heartbeat: int,
        stall_timeout: float,
        end: Callable[[str, int, str], NoReturn],
    ):
        """
        Args:
          heartbeat: seconds without a heartbeat after which a process is lost.
          stall_timeout: seconds without progress of any process after which the run is stuck; 0.0: never.
          end: ends this process; takes "lost" or "end", an exit code and the reason.
        """
        self.members = [Member(i, host) for i, host in enumerate(hosts)]
        self.me = self.members[index]
        self.others = [member for member in self.members if member is not self.me]
        self.store = store
        self._index = index
        self._heartbeat = heartbeat
        self._period = min(heartbeat / 5, 3.0)  # within the time that coordination.hold_aborts gives
        self._stall_timeout = stall_timeout
        self._end = end
        self._stopped = threading.Event()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name="processes", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Asks the thread to end."""
        self._stopped.set()
        self._hurry.set()

    def join(self) -> None:
        """Waits until the thread has ended: one that is inside of JAX aborts the interpreter when that ends."""
        self._thread.join()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Waits until the heartbeats of all processes fulfil `condition`, and the others know what `me` is."""
        written = self.me.beats + 2
        self._hurry.set()
        while not (self.me.beats >= written and condition()):
            time.sleep(0.01)
        self._hurry.clear()

    def wait_for_signs_of_life(self) -> None:
        """Waits until each of the others has sent new heartbeats, or has left in order; the thread ends the process if
        one is lost."""
        beats = [other.beats + _IN_FLIGHT for other in self.others]
        self.wait(lambda: all(o.left or o.beats >= n for o, n in zip(self.others, beats, strict=True)))

    def is_silent(self, member: Member) -> bool:
        """Returns true when the last heartbeat is too old."""
        return time.monotonic() - member.heard > self._heartbeat

    def exchange(self) -> None:
        """Writes a heartbeat and reads those of the others; ends this process if another has announced the end."""
        self.me.beats += 1
        if not self.store:
            return
        entries = self.store.exchange(f"run/beat/{self._index}", self.me.to_json(), "run/")
        for i, member in enumerate(self.members):
            if member is not self.me and (heartbeat := entries.get(f"run/beat/{i}")):
                member.update(heartbeat)
        if "run/end" in entries:
            end = json.loads(entries["run/end"])
            self._end(end["kind"], end["code"], end["reason"])

    def _run(self) -> None:
        """Runs in the thread until `stop`."""
        last = awake = time.monotonic()
        awaited: list[int] = []  # after a freeze of this process: heartbeats that prove the others to be there
        while True:
            if self._hurry.wait(self._period):
                time.sleep(0.05)
            if self._stopped.is_set():
                return
            now = time.monotonic()
            if now - last > self._period + self._heartbeat / 2:  # this process was frozen, not the others
                awake = now
                awaited = [other.beats + _IN_FLIGHT for other in self.others]
            try:
                self.exchange()
            except Unreachable:
                if self._stopped.is_set():
                    return
                self.store = None
                self._lose(self.me if awaited else self.members[0])
            last = now = time.monotonic()
            if any(other.beats >= n for other, n in zip(self.others, awaited, strict=False)):
                awaited = []
            for other in self.others:
                if not other.left and now - max(other.heard, awake) > self._heartbeat + self._period:
                    self._lose(self.me if awaited else other)
            if self._stall_timeout and self._index == 0:
                self._judge(now, awake)

    def _judge(self, now: float, awake: float) -> None:
        """Ends the run if no process makes progress. All wait for the one that is stuck, so its step is the lowest."""
        busy = sorted((member for member in self.members if not member.done), key=lambda member: member.step)
        idle = now - max([awake, *(member.since or now for member in busy)]) if busy else 0.0
        if idle > self._stall_timeout:
            stuck = [f"{member.name} is stuck while {member.doing}" for member in busy if member.step == busy[0].step]
            more = f", {len(stuck) - 3} more" if len(stuck) > 3 else ""
            who = f": {', '.join(stuck[:3])}{more}" if self.others else f" while {busy[0].doing}"
            self._end("lost", 1, f"no progress for {idle:.0f} s{who}, {_after(busy[0].step)}")

    def _lose(self, member: Member) -> NoReturn:
        reason = f"{member.name} is lost: no heartbeat for {self._heartbeat} s, {_after(self.me.step)}"
        self._end("lost", 1, reason)


def _after(step: int) -> str:
    return f"{f'after step {step}' if step else 'before the first step'}; thread stacks above"
