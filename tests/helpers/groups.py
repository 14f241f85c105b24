"""Groups of real processes on this machine; this file is also the program that they run."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from flax_mlm.distributed.rendezvous import free_port
from tests.helpers.paths import ROOT

HEARTBEAT = 2


PROMISE = HEARTBEAT + 15  # seconds after which nobody may be left when one process is lost


def program() -> None:
    """Joins the others, and sums over all devices, step by step; before step 3 it does what --then says."""
    from absl import flags

    from flax_mlm.cli import cluster
    from flax_mlm.distributed import environment, processes
    from flax_mlm.errors import Failure, UserError

    environment.prepare()
    steps = flags.DEFINE_integer("steps", 4, "")
    stall = flags.DEFINE_float("stall", 0.0, "")
    color = flags.DEFINE_string("color", "red", "a part of the identity")
    then = flags.DEFINE_string("then", "", "")
    flags.FLAGS(sys.argv)

    def act(group: processes.ProcessGroup, step: int) -> None:
        if then.value == "UserError":
            raise UserError("the text is missing")
        if then.value == "ValueError":
            raise ValueError("no\nsuch value")
        if then.value == "SystemExit":
            sys.exit(75)
        if then.value == "leave":
            group.at_leave(lambda: print("left", flush=True))
            group.leave(75, "SIGTERM: there is nothing to save")
        if then.value == "sleep":
            with group.untimed("compiling"):
                time.sleep(2.5)
        if then.value == "hang":
            group.progress("waiting for a batch", step)
            time.sleep(1000)
        if then.value == "shout":  # until the pipe is full
            while True:
                print("x" * 1000, file=sys.stderr if color.value == "black" else sys.stdout, flush=True)

    def run() -> None:
        identity = {"color": color.value, "config.train.steps": steps.value}
        with processes.join(cluster.from_flags(), identity, stall.value) as group:
            import jax
            import jax.numpy as jnp

            mesh = jax.make_mesh((jax.device_count(),), ("data",))
            sharding = jax.NamedSharding(mesh, jax.P("data"))
            x = jax.make_array_from_callback((mesh.size,), sharding, lambda i: jnp.arange(1.0, mesh.size + 1)[i])
            total = jax.jit(jnp.sum, out_shardings=jax.NamedSharding(mesh, jax.P()))
            with group.untimed("compiling"):
                total(x)
            for step in range(1, steps.value + 1):
                if step == 3:
                    act(group, step - 1)
                group.progress("summing", step - 1)
                found = float(total(x))
                if step < 5:
                    print("step", step, flush=True)
                time.sleep(0.02)
            if then.value == "differ":
                group.check_same("corpus", f"of {group.index}")
            group.check_same("corpus", "the same")
            if then.value == "linger":
                time.sleep(2.5)
            result = {"sum": found, "index": group.index, "count": group.count, "hosts": group.hosts}
            print(json.dumps({**result, "run_id": group.run_id}), flush=True)

    try:
        run()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except Failure as e:
        print(f"stopped: {e}", file=sys.stderr)
        sys.exit(1)


class Group:
    """Processes of one run."""

    def __init__(self, count: int = 2):
        self.count, self.started = count, list[subprocess.Popen]()
        self.address = f"127.0.0.1:{free_port()}"

    def start(self, id: int | None, *flags: str, env: dict[str, str] | None = None) -> subprocess.Popen:
        """Starts process `id`; None: it is not told about the others."""
        line = [sys.executable, "-m", "tests.helpers.groups", f"--heartbeat={HEARTBEAT}"]
        if id is not None:
            line += [f"--coordinator={self.address}", f"--num_processes={self.count}", f"--process_id={id}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        pipe = subprocess.PIPE
        process = subprocess.Popen([*line, *flags], stdout=pipe, stderr=pipe, text=True, env=environment)
        self.started.append(process)
        return process

    def start_all(self, *flags: str, **by_id: str) -> list[subprocess.Popen]:
        """Starts all; `_1="--then=hang"` is for process 1 only."""
        return [self.start(i, *flags, *by_id.get(f"_{i}", "").split()) for i in range(self.count)]

    def kill(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()


def make_groups() -> Iterator[Callable[..., Group]]:
    """The fixture `group`: makes groups, and kills them at the end of the test."""
    groups = list[Group]()

    def make(count: int = 2) -> Group:
        groups.append(Group(count))
        return groups[-1]

    yield make
    for each in groups:
        each.kill()


def wait_for(process: subprocess.Popen, text: str) -> None:
    """Reads the output of `process` until a line contains `text`."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"no '{text}': {process.stderr.read()}")


def ends(process: subprocess.Popen, code: int, *texts: str, within: float = 60) -> None:
    """Asserts the exit code, and that the last line of stderr contains all `texts`."""
    _, err = process.communicate(timeout=within)
    assert process.returncode == code, err
    last = err.splitlines()[-1]
    assert all(text in last for text in texts), err


def results(processes: list[subprocess.Popen]) -> list[dict]:
    """What they printed last, if all went well."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, ""), err
        found.append(json.loads(out.splitlines()[-1]))
    return found


if __name__ == "__main__":
    program()
