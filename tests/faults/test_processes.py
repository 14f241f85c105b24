"""Faults between the processes of one run: killed, frozen, stuck, missing, wrongly told. Nobody is left behind."""

import contextlib
import signal
import socket
import subprocess
import threading
import time

import pytest

from tests.helpers.groups import HEARTBEAT, PROMISE, ends, make_groups, results, wait_for

group = pytest.fixture(make_groups)

FOR_EVER = "--steps=1000000"
HOST = socket.gethostname()
FULL = pytest.mark.full
TWO_OR_THREE = pytest.mark.parametrize("count", [2, pytest.param(3, marks=FULL)])


def lose(processes: list[subprocess.Popen], victim: int, how: signal.Signals, *texts: str) -> None:
    """Sends the signal after step 3, and asserts that the others leave in time and name the victim."""
    for process in processes:
        wait_for(process, "step 3")
    processes[victim].send_signal(how)
    for process in processes:
        if process is not processes[victim]:
            ends(process, 1, f"stopped: process {victim} ({HOST})", "after step", *texts, within=PROMISE)


# Killed


@pytest.mark.fault(10)
@TWO_OR_THREE
def test_peer_is_killed(group, outcome, count):
    lose(group(count).start_all(FOR_EVER), 1, signal.SIGKILL, "is lost: no heartbeat", "thread stacks above")
    outcome("detected", kills=1)


@pytest.mark.fault(10)
@FULL
def test_peer_is_killed_while_the_other_works_alone(group, outcome):
    first, second = group().start_all(FOR_EVER, _0="--then=hang")
    wait_for(first, "step 2")
    wait_for(second, "step 2")
    time.sleep(0.5)  # by now process 0 is in no collective
    second.kill()
    ends(first, 1, f"stopped: process 1 ({HOST}) is lost", within=PROMISE)
    outcome("detected", kills=1)


@pytest.mark.fault(10)
@FULL
@pytest.mark.parametrize("color", ["white", "black"])
def test_peer_is_killed_while_nobody_reads_the_log(group, outcome, color):
    """The survivor's stdout (white) or stderr (black) is full."""
    first, second = group().start_all(FOR_EVER, f"--color={color}", _0="--then=shout")
    wait_for(second, "step 2")
    time.sleep(1)
    second.kill()
    assert first.wait(timeout=PROMISE) == 1
    assert color == "black" or f"stopped: process 1 ({HOST}) is lost" in first.stderr.read()
    outcome("detected", kills=1)


@pytest.mark.fault(10)
@FULL
def test_peer_is_killed_before_all_have_come(group, outcome):
    """Nothing has started yet: one that is started in its place is welcome."""
    three = group(3)
    first, second = three.start(0), three.start(1)
    wait_for(first, "host 2 of 3 joined")
    second.kill()
    second.wait()
    again, third = three.start(1), three.start(2)
    assert {r["sum"] for r in results([first, again, third])} == {21}
    outcome("recovered", kills=1)


@pytest.mark.fault(10)
@FULL
@pytest.mark.parametrize("then", ["hang", "linger"])
def test_peer_is_killed_when_it_has_finished(group, outcome, then):
    """It waits for process 0, which still works, or is about to end too."""
    first, second = group().start_all(_0=f"--then={then}")
    wait_for(second, "step 2" if then == "hang" else "run_id")
    time.sleep(0.3)
    second.kill()
    ends(first, 1, f"stopped: process 1 ({HOST}) is lost", within=PROMISE)
    outcome("detected", kills=1)


@pytest.mark.fault(11)
@TWO_OR_THREE
def test_coordinator_is_killed(group, outcome, count):
    lose(group(count).start_all(FOR_EVER), 0, signal.SIGKILL, "is lost: no heartbeat", "thread stacks above")
    outcome("detected", kills=1)


@pytest.mark.fault(11)
@FULL
def test_coordinator_is_killed_before_all_have_come(group, outcome):
    """Nothing has started yet: the others go on calling, and one that is started in its place answers."""
    two = group()
    first = two.start(0)
    wait_for(first, "host 1 of 2")
    first.kill()
    first.wait()
    second, again = two.start(1), two.start(0)
    assert {r["sum"] for r in results([again, second])} == {10}
    outcome("recovered", kills=1)


@pytest.mark.fault(11)
@FULL
def test_coordinator_is_killed_while_another_waits_in_its_room(group, outcome):
    three = group(3)
    first, second = three.start(0), three.start(1, "--initialization_timeout=4")
    wait_for(first, "host 2 of 3")
    first.kill()
    ends(second, 1, f"stopped: no coordinator at {three.address} after 4 s", within=PROMISE)
    outcome("detected", kills=1)


@pytest.mark.fault(11)
@FULL
def test_coordinator_is_killed_when_the_other_has_finished(group, outcome):
    first, second = group().start_all(_0="--then=linger")
    wait_for(second, "run_id")
    first.kill()
    ends(second, 1, f"stopped: process 0 ({HOST}) is lost", within=PROMISE)
    outcome("detected", kills=1)


# Frozen, or stuck


@pytest.mark.fault(12)
@FULL
@pytest.mark.parametrize(("count", "victim"), [(2, 1), (3, 2), (2, 0), (3, 0)])
def test_process_is_frozen(group, outcome, count, victim):
    processes = group(count).start_all(FOR_EVER)
    lose(processes, victim, signal.SIGSTOP, f"no heartbeat for {HEARTBEAT} s", "thread stacks above")
    processes[victim].send_signal(signal.SIGCONT)  # when it wakes up, it leaves as well
    ends(processes[victim], 1, f"stopped: process {victim} ({HOST}) is lost: no heartbeat")
    outcome("detected")


@pytest.mark.fault(12)
@FULL
@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)])
def test_process_is_frozen_for_a_moment(group, outcome, victims):
    processes = group().start_all("--steps=100")
    for process in processes:
        wait_for(process, "step 3")
    for victim in victims:
        processes[victim].send_signal(signal.SIGSTOP)
    time.sleep(HEARTBEAT / 2)
    for victim in victims:
        processes[victim].send_signal(signal.SIGCONT)
    assert {r["sum"] for r in results(processes)} == {10}
    outcome("harmless", count=len(victims))


@pytest.mark.fault(13)
@FULL
@pytest.mark.parametrize("victim", [0, 1])
def test_process_is_stuck(group, outcome, victim):
    processes = group().start_all(FOR_EVER, "--stall=5", **{f"_{victim}": "--then=hang"})
    for process in processes:
        ends(process, 1, "stopped: no progress for", within=5 + PROMISE)
    outcome("detected")


@pytest.mark.fault(13)
@FULL
def test_stuck_process_is_named_with_its_step_and_its_stack(group, outcome):
    processes = group(3).start_all(FOR_EVER, "--stall=5", _2="--then=hang")
    said = [process.communicate(timeout=5 + PROMISE)[1] for process in processes]
    assert len({text.splitlines()[-1] for text in said}) == 1  # all say the same
    assert f"process 2 ({HOST}) is stuck while waiting for a batch" in said[0]
    assert "after step 2; thread stacks above" in said[0]
    assert "in act" in said[2]  # the function in which it sleeps
    outcome("detected")


@pytest.mark.fault(13)
def test_one_process_is_stuck(group, outcome):
    process = group().start(None, "--stall=2", "--then=hang")
    ends(process, 1, "stopped: no progress for 2 s while waiting for a batch, after step 2", within=2 + PROMISE)
    outcome("detected")


# Missing, or somewhere else


@pytest.mark.fault(15)
def test_a_process_that_never_comes_is_named_by_all(group, outcome):
    three = group(3)
    for process in [three.start(i, "--initialization_timeout=6") for i in (0, 2)]:
        ends(process, 1, "stopped: process 1 of 3 did not come within 6 s", within=PROMISE)
    outcome("detected")


@pytest.mark.fault(15)
@pytest.mark.parametrize("coordinator", ["", pytest.param("--coordinator=no.such.host.invalid:1234", marks=FULL)])
def test_there_is_no_coordinator(group, outcome, coordinator):
    process = group().start(1, "--initialization_timeout=2", *coordinator.split())
    ends(process, 1, "stopped: no coordinator at", "after 2 s; is process 0 running", within=PROMISE)
    outcome("detected")


@pytest.mark.fault(15)
@FULL
@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"5\n", b"[" * 70_000])
def test_something_else_listens_there(group, outcome, answer):
    two = group()
    host, port = two.address.split(":")
    with socket.create_server((host, int(port))) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])
                    held[-1].sendall(answer)

        held: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        process = two.start(1, "--initialization_timeout=2")
        ends(process, 1, f"stopped: no coordinator at {two.address} after 2 s", within=PROMISE)
        server.shutdown(socket.SHUT_RDWR)
    outcome("detected")


@pytest.mark.fault(15)
@pytest.mark.parametrize("coordinator", ["198.51.100.7:1234", pytest.param("no.such.host.invalid:1234", marks=FULL)])
def test_coordinator_is_not_this_machine(group, outcome, coordinator):
    process = group().start(0, f"--coordinator={coordinator}")
    ends(process, 2, f"error: --coordinator={coordinator}: process 0 cannot listen there")
    outcome("detected")


@pytest.mark.fault(15)
@FULL
def test_port_is_taken(group, outcome):
    two = group()
    host, port = two.address.split(":")
    with socket.create_server((host, int(port))):
        ends(two.start(0), 2, f"error: --coordinator={two.address}: process 0 cannot listen there", "in use")
    outcome("detected")


@pytest.mark.fault(15)
@FULL
@pytest.mark.parametrize("late", [0, 2])
def test_one_comes_late(group, outcome, late):
    three = group(3)
    others = [three.start(i, "--heartbeat=1") for i in range(3) if i != late]
    time.sleep(3)
    assert {r["sum"] for r in results([three.start(late, "--heartbeat=1"), *others])} == {21}
    outcome("recovered")


NONSENSE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(range(256)) * 4,
    bytes(range(256)) * 4,
    b"\n",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"x" * 300_000,  # and no end of the line
    b"",  # a connection that says nothing
]


@pytest.mark.fault(15)
@FULL
def test_strangers_do_no_harm(group, outcome):
    """Port scanners and the like, before and during the run, at the store and at JAX's own service."""
    two = group()
    host, port = two.address.split(":")

    def visit(ports: list[int]) -> None:
        for each in ports:
            visitors = [socket.create_connection((host, each), timeout=PROMISE) for _ in NONSENSE]
            for visitor, text in zip(visitors, NONSENSE, strict=True):
                with contextlib.suppress(ConnectionError):
                    visitor.sendall(text)
                visitor.close()

    first = two.start(0, "--steps=300")
    wait_for(first, "host 1 of 2")
    visit([int(port)])
    second = two.start(1, "--steps=300")
    wait_for(second, "step 3")
    visit([int(port), int(port) + 1])
    assert {r["sum"] for r in results([first, second])} == {10}
    outcome("harmless", count=3 * len(NONSENSE))


# Wrongly told


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("flags", "texts"),
    [
        ("--color=blue", ["color is blue on process 1", "and red on process 0"]),
        pytest.param(
            "--color=blue --steps=300",
            ["color is blue on process 1", "config.train.steps is 300 on process 1", "and 4 on process 0"],
            marks=FULL,
        ),
        pytest.param("--heartbeat=5", ["--heartbeat is 5 on process 1", f"and {HEARTBEAT} on process 0"], marks=FULL),
        pytest.param("--num_processes=3", ["--num_processes is 3 on process 1", "and 2 on process 0"], marks=FULL),
        pytest.param("--process_id=7", ["--process_id is 7", "expected 0 to 1"], marks=FULL),
    ],
)
def test_processes_are_told_different_things(group, outcome, flags, texts):
    for process in group().start_all(_1=flags):
        ends(process, 2, "error: ", *texts)
    outcome("detected")


@pytest.mark.fault(16)
@FULL
def test_all_hear_of_a_mistake(group, outcome):
    for process in group(3).start_all(_2="--color=blue"):
        ends(process, 2, "error: color is blue on process 2", "and red on process 0")
    outcome("detected")


@pytest.mark.fault(16)
def test_id_is_given_twice(group, outcome):
    three = group(3)
    for process in [three.start(i) for i in (0, 1, 1)]:
        ends(process, 2, "error: --process_id=1 is given twice: to process 1")
    outcome("detected")


@pytest.mark.fault(16)
@FULL
def test_two_coordinators(group, outcome):
    two = group()
    first = two.start(0)
    wait_for(first, "host 1 of 2")
    ends(two.start(0), 2, "error: --coordinator=", "cannot listen there", "in use")
    results([first, two.start(1)])
    outcome("detected")


@pytest.mark.fault(16)
@FULL
def test_late_twin_is_refused_and_the_run_goes_on(group, outcome):
    two = group()
    processes = two.start_all("--steps=300")
    for process in processes:
        wait_for(process, "step 3")
    ends(two.start(1), 2, "error: --process_id=1 is taken", "was this one started twice?")
    assert {r["sum"] for r in results(processes)} == {10}
    outcome("detected")


@pytest.mark.fault(16)
@FULL
@pytest.mark.parametrize(
    ("flags", "env", "text"),
    [
        ("--process_id=1", {}, "several processes need all of --coordinator, --num_processes and --process_id"),
        ("--num_processes=2", {}, "several processes need all of"),
        ("--num_processes=1 --process_id=3", {}, "--process_id is 3; with --num_processes=1 expected 0 to 0"),
        ("--coordinator=here --num_processes=2 --process_id=0", {}, "--coordinator is 'here'; expected HOST:PORT"),
        ("--coordinator=here:99999 --num_processes=2 --process_id=0", {}, "expected HOST:PORT"),
        ("", {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; expected a whole number"),
        ("", {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID is '-1'; expected a whole number"),
    ],
)
def test_settings_make_no_sense(group, outcome, flags, env, text):
    ends(group().start(None, *flags.split(), env=env), 2, f"error: {text}" if "HOST" not in text else text)
    outcome("detected")


@pytest.mark.fault(16)
@FULL
def test_impossible_id_and_no_coordinator(group, outcome):
    ends(group().start(2), 2, "error: --process_id is 2; with --num_processes=2 expected 0 to 1", within=PROMISE)
    outcome("detected")
