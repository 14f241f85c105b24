"""Groups of real processes on this machine; this file is also the program that they run."""

import socket

import pytest

from tests.helpers.groups import ends, make_groups, results

group = pytest.fixture(make_groups)


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
