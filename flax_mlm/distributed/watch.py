"""Heartbeats of the processes of a run: who is there, how far each is, which one is lost or stuck."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from flax_mlm.distributed.coordination import Store, Unreachable

End = Callable[[str, int, str], NoReturn]  # takes "lost" or "end", an exit code and the reason

_IN_FLIGHT = 3  # heartbeats of a process that may still arrive when it is gone: written, on their way, or both


@dataclasses.dataclass
class Member:
    """State of one process, as its last heartbeat gave it.

    Attributes:
      name: index and host.
      beats: number of heartbeats so far.
      doing: current phase of the main loop.
      step: last finished step.
      since: start of that phase; None: it may take any time.
      done: true after the last step.
      heard: when the last heartbeat arrived; all times are by the clock of this process.
    """

    name: str
    beats: int = 0
    doing: str = "starting"
    step: int = 0
    since: float | None = None
    done: bool = False
    heard: float = dataclasses.field(default_factory=time.monotonic)

    def to_json(self) -> str:
        """Encodes a heartbeat, with the age of the phase instead of its start: clocks differ."""
        age = None if self.since is None else time.monotonic() - self.since
        return json.dumps([self.beats, self.doing, self.step, age, self.done])

    def update(self, heartbeat: str) -> None:
        """Takes over a heartbeat of another process, if it is new."""
        beats, self.doing, self.step, age, self.done = json.loads(heartbeat)
        if beats != self.beats:
            self.beats = beats
            self.heard = time.monotonic()
            self.since = None if age is None else self.heard - age


class Watch(threading.Thread):
    """Thread that exchanges heartbeats through the store, and ends the process when another is lost or stuck.

    Attributes:
      members: all processes, by index.
      me: this process; its attributes may be set from any thread.
      others: all processes but this one.
      store: of the run; None for a single process, or when it is lost.
      period: seconds between two heartbeats.
    """

    def __init__(self, index: int, hosts: list[str], store: Store | None, heartbeat: int, stall_after: float, end: End):
        """
        Args:
          heartbeat: seconds without a heartbeat after which a process is lost.
          stall_after: seconds without progress of any process after which the run is stuck; 0.0: never.
          end: ends this process.
        """
        super().__init__(name="processes", daemon=True)
        self.members = [Member(f"process {i} ({host})") for i, host in enumerate(hosts)]
        self.me = self.members[index]
        self.others = [member for member in self.members if member is not self.me]
        self.store = store
        self.period = min(heartbeat / 5, 3.0)  # within the time that coordination.hold_aborts gives
        self._index = index
        self._heartbeat = heartbeat
        self._stall_after = stall_after
        self._end = end
        self._stopped = False
        self._hurry = threading.Event()

    def stop(self) -> None:
        """Asks the thread to end."""
        self._stopped = True
        self._hurry.set()

    def wait_for_signs_of_life(self) -> None:
        """Waits until each of the others has sent new heartbeats; the thread ends the process if one is lost."""
        beats = [other.beats + _IN_FLIGHT for other in self.others]
        self._hurry.set()
        while any(o.beats < n for o, n in zip(self.others, beats, strict=True)):
            time.sleep(0.01)
        self._hurry.clear()

    def exchange(self) -> None:
        """Writes a heartbeat and reads those of the others; ends this process if another has announced the end."""
        self.me.beats += 1
        if not self.store:
            return
        self.store.set(f"run/beat/{self._index}", self.me.to_json())
        entries = self.store.read("run/")
        for i, member in enumerate(self.members):
            if member is not self.me and (heartbeat := entries.get(f"run/beat/{i}")):
                member.update(heartbeat)
        if "run/end" in entries:
            self._end(*json.loads(entries["run/end"]))

    def run(self) -> None:
        """Runs in the thread until `stop`."""
        last = awake = time.monotonic()
        awaited: list[int] = []  # after a freeze of this process: heartbeats that prove the others to be there
        while True:
            if self._hurry.wait(self.period):
                time.sleep(0.05)
            if self._stopped:
                return
            now = time.monotonic()
            if now - last > self.period + self._heartbeat / 2:  # this process was frozen, not the others
                awake = now
                awaited = [other.beats + _IN_FLIGHT for other in self.others]
            try:
                self.exchange()
            except Unreachable:
                if self._stopped:
                    return
                self.store = None
                self._lose(self.me if awaited else self.members[0])
            last = now = time.monotonic()
            if any(other.beats >= n for other, n in zip(self.others, awaited, strict=False)):
                awaited = []
            for other in self.others:
                if now - max(other.heard, awake) > self._heartbeat + self.period:
                    self._lose(self.me if awaited else other)
            if self._stall_after and self._index == 0:
                self._judge(now, awake)

    def _judge(self, now: float, awake: float) -> None:
        """Ends the run if no process makes progress. All wait for the one that is stuck, so its step is the lowest."""
        busy = sorted((member for member in self.members if not member.done), key=lambda member: member.step)
        idle = now - max([awake, *(member.since or now for member in busy)]) if busy else 0.0
        if idle > self._stall_after:
            stuck = [f"{member.name} is stuck while {member.doing}" for member in busy if member.step == busy[0].step]
            more = f", {len(stuck) - 3} more" if len(stuck) > 3 else ""
            who = f": {', '.join(stuck[:3])}{more}" if self.others else f" while {busy[0].doing}"
            self._end("lost", 1, f"no progress for {idle:.0f} s{who}, {_after(busy[0].step)}")

    def _lose(self, member: Member) -> NoReturn:
        self._end("lost", 1, f"{member.name} is lost: no heartbeat for {self._heartbeat} s, {_after(self.me.step)}")


def _after(step: int) -> str:
    return f"{f'after step {step}' if step else 'before the first step'}; thread stacks above"
