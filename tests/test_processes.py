"""Groups of real processes on this machine; this file is also the program that they run."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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


def free_ports() -> int:
    """A port of this machine that is free, and so is the next one."""
    while True:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            with socket.create_server(("127.0.0.1", port + 1)):
                return port


class Group:
    """Processes of one run."""

    def __init__(self, count: int = 2):
        self.count, self.started = count, list[subprocess.Popen]()
        self.address = f"127.0.0.1:{free_ports()}"

    def start(self, id: int | None, *flags: str, env: dict[str, str] | None = None) -> subprocess.Popen:
        """Starts process `id`; None: it is not told about the others."""
        line = [sys.executable, __file__, f"--heartbeat={HEARTBEAT}"]
        if id is not None:
            line += [f"--coordinator={self.address}", f"--num_processes={self.count}", f"--process_id={id}"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **(env or {})}
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


group = pytest.fixture(make_groups)


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


def test_one_process_is_a_group_of_one(group):
    (result,) = results([group().start(None)])
    assert result["sum"] == 1 + 2
    assert (result["index"], result["count"], result["hosts"]) == (0, 1, [socket.gethostname()])


def test_three_processes_agree(group):
    three = group(3)
    found = results([three.start(i) for i in (2, 1, 0)])
    assert [r["index"] for r in found] == [2, 1, 0]
    assert {r["sum"] for r in found} == {1 + 2 + 3 + 4 + 5 + 6}
    assert {r["count"] for r in found} == {3}
    assert {tuple(r["hosts"]) for r in found} == {(socket.gethostname(),) * 3}
    assert len({r["run_id"] for r in found}) == 1
    assert len(found[0]["run_id"]) == 16


def test_process_0_logs_who_joins(group):
    two = group()
    first, second = two.start_all("--steps=1")
    out, _ = first.communicate(timeout=60)
    host = socket.gethostname()
    assert f"host 1 of 2 joined: {host} ({first.pid}); it waits at {two.address}" in out
    assert f"host 2 of 2 joined: {host} ({second.pid})" in out


def test_environment_variables_stand_for_the_flags(group):
    two = group()
    env = {"JAX_COORDINATOR_ADDRESS": two.address, "JAX_NUM_PROCESSES": "2"}
    found = results([two.start(None, env={**env, "JAX_PROCESS_ID": str(i)}) for i in range(2)])
    assert [r["index"] for r in found] == [0, 1]


@pytest.mark.parametrize("count", [1, 2])
def test_slurm_is_detected(group, count):
    some = group(count)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
    slurm["JAX_COORDINATOR_PORT"] = some.address.split(":")[1]
    ids = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]
    found = results([some.start(None, env={**slurm, **each}) for each in ids])
    assert [(r["index"], r["count"]) for r in found] == [(i, count) for i in range(count)]


def test_a_proxy_is_not_asked_for_our_own_hosts(group):
    # nobody listens on port 9; with the proxy JAX would wait for it for ever
    proxy = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "grpc_proxy")}
    results([group().start(None, env={**proxy, "no_proxy": "example.com"})])


def test_who_has_finished_waits_for_the_others(group):
    results(group().start_all("--heartbeat=1", _0="--then=linger"))
    results(group().start_all("--heartbeat=1", _1="--then=linger"))


def test_an_untimed_phase_is_no_stall(group):
    results(group().start_all("--heartbeat=1", "--stall=1.5", _1="--then=sleep"))


def test_a_value_that_differs_is_named(group):
    two = group().start_all("--then=differ")
    said = [process.communicate(timeout=60)[1] for process in two]
    assert all("corpus is of" in text and "on process 0" in text and "on process 1" in text for text in said)
    assert {2} <= {process.returncode for process in two} <= {1, 2}  # 1: the other was quicker to find it


@pytest.mark.parametrize(
    ("culprit", "then", "code", "line", "others_code", "others_line"),
    [
        (0, "UserError", 2, "error: the text is missing", 1, "left with exit code 2: the text is missing"),
        (1, "ValueError", 1, "such value", 1, "left with exit code 1: ValueError: no such value"),
        (0, "SystemExit", 75, "", 75, "stopped after a preemption"),
        (1, "leave", 75, "stopped: SIGTERM: there is nothing to save", 75, "stopped after a preemption: SIGTERM"),
    ],
)
def test_one_that_leaves_takes_the_others_along(group, culprit, then, code, line, others_code, others_line):
    two = group().start_all("--steps=10000", **{f"_{culprit}": f"--then={then}"})
    name = f"process {culprit} ({socket.gethostname()})"
    ends(two[1 - culprit], others_code, f"stopped: {name} {others_line}")
    out, err = two[culprit].communicate(timeout=60)
    assert two[culprit].returncode == code
    assert err.endswith(line + "\n" * bool(line))
    assert ("left" in out.splitlines()) == (then == "leave")  # what was given to `at_leave` is called


if __name__ == "__main__":
    program()
