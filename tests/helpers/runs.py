"""Runs of `train` in processes of their own, watched line by line, and what they leave."""

import json
import queue
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np

from flax_mlm.distributed.rendezvous import free_port

RATES = {"tokens_per_second", "data_wait", "eta_seconds", "mfu", "train_seconds"}
PATIENCE = 180  # seconds for what must happen; only a hang reaches it


class Watched:
    """A running `train`, of one process or several, whose lines can be waited for."""

    def __init__(self, toy, workdir: Path, *flags: str, processes: int = 1, devices: int = 1, command: str = "train"):
        self.workdir, self.lines = workdir, []
        self._queue: queue.Queue[str | None] = queue.Queue()
        address = f"127.0.0.1:{free_port()}"
        self.processes: list[subprocess.Popen] = []
        for i in range(processes):
            place = [f"--coordinator={address}", f"--num_processes={processes}", f"--process_id={i}", "--heartbeat=3"]
            line = [f"--workdir={workdir}", *flags, *(place if processes > 1 else [])]
            self.processes.append(toy.start(command, *line, devices=devices))
        self.err = [""] * processes
        self._readers = [threading.Thread(target=self._read_err, args=(i,)) for i in range(processes)]
        self._readers += [threading.Thread(target=self._read_out, args=(i,)) for i in range(processes)]
        for reader in self._readers:
            reader.daemon = True
            reader.start()

    @property
    def process(self) -> subprocess.Popen:
        return self.processes[0]

    def _read_err(self, i: int) -> None:
        self.err[i] = self.processes[i].stderr.read()

    def _read_out(self, i: int) -> None:
        for line in self.processes[i].stdout:
            if i == 0:
                self._queue.put(line)
        if i == 0:
            self._queue.put(None)

    def until_line(self, start: str) -> None:
        while (line := self._queue.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
            if line.startswith(start):
                return
        raise AssertionError(f"no line '{start}': {''.join(self.lines)} {self.err}")

    def until_path(self, pattern: str) -> None:
        end = time.monotonic() + PATIENCE
        while not list(self.workdir.glob(pattern)):
            assert self.process.poll() is None, f"no '{pattern}': {self.err}"
            assert time.monotonic() < end, f"no '{pattern}': {self.err}"
            time.sleep(0.0005)

    def kill(self, *which: int) -> None:
        """SIGKILL to some of the processes; to all when none is named."""
        for i in which or range(len(self.processes)):
            assert self.processes[i].poll() is None, "it ended before it was killed"
            self.processes[i].send_signal(signal.SIGKILL)
            self.processes[i].wait()

    def finish(self) -> tuple[list[int], str]:
        """Exit codes, and what process 0 said on stdout. `err` has what each said on stderr."""
        codes = [process.wait(timeout=PATIENCE) for process in self.processes]
        for reader in self._readers:
            reader.join(timeout=PATIENCE)
        while (line := self._queue.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
        return codes, "".join(self.lines)


def finish(toy, workdir: Path, *flags: str, **where: int) -> str:
    """Runs to the end; returns stdout."""
    run = Watched(toy, workdir, *flags, **where)
    codes, out = run.finish()
    assert set(codes) == {0}, (codes, run.err)
    return out


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Everything that a checkpoint holds, read by orbax alone."""
    import jax
    import orbax.checkpoint as ocp

    found = {}
    for folder in sorted((workdir / "checkpoints" / str(step)).iterdir()):
        if not folder.is_dir() or folder.name == "meta":
            continue
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            restored = checkpointer.restore(folder, restore_args=as_numpy)
        for path, value in jax.tree_util.tree_leaves_with_path(restored):
            found[folder.name + jax.tree_util.keystr(path)] = np.asarray(value)
    assert len(found) > 20
    return found


def metrics_of(workdir: Path, kind: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in RATES} for line in lines if line["kind"] == kind]


def assert_same_run(workdir: Path, other: Path, step: int) -> None:
    """Bit for bit: parameters, optimizer state, the metrics of every step and evaluation, and the result."""
    mine, theirs = arrays(workdir, step), arrays(other, step)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name, strict=True)
    for kind in ("train", "validation"):
        assert metrics_of(workdir, kind) == metrics_of(other, kind)
    assert (workdir / "result.json").read_text() == (other / "result.json").read_text()
    assert not (workdir / "lease.json").exists()
