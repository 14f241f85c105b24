"""Signal handlers: only while a run needs them."""

import os
import signal
import threading
import time

import pytest

from flax_mlm.distributed import preemption


@pytest.fixture(autouse=True)
def own_handlers():
    """Handlers of the program that calls us."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    mine = {number: signal.signal(number, lambda *_: None) for number in numbers}
    ours = {number: signal.getsignal(number) for number in mine}
    yield ours
    for number, handler in mine.items():
        signal.signal(number, handler)


def is_restored(handlers: dict) -> bool:
    fd = signal.set_wakeup_fd(-1)
    threads = [thread.name for thread in threading.enumerate()]
    return fd == -1 and "signals" not in threads and all(signal.getsignal(n) is h for n, h in handlers.items())


def test_handlers_are_restored(own_handlers):
    with preemption.Stop():
        assert not is_restored(own_handlers)
    assert is_restored(own_handlers)


def test_handlers_are_restored_after_a_failure(own_handlers):
    with pytest.raises(ValueError), preemption.Stop():
        raise ValueError
    assert is_restored(own_handlers)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_work_is_unsaved_is_only_noted(capsys, number):
    with preemption.Stop() as stop:
        stop.hold()
        os.kill(os.getpid(), number)
        end = time.monotonic() + 10
        while not stop.requested and time.monotonic() < end:
            time.sleep(0.01)
        assert stop.requested
    assert f"{number.name}: saving, then leaving" in capsys.readouterr().err


@pytest.fixture
def exits(monkeypatch) -> list[int]:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ("SIGHUP SIGHUP", None),
        ("SIGHUP SIGTERM", None),
        ("SIGTERM SIGHUP", None),
        ("SIGHUP SIGTERM SIGHUP", None),
        ("SIGTERM SIGINT", 130),
        ("SIGHUP SIGINT SIGTERM", 143),
    ],
)
def test_a_hangup_with_another_signal_does_not_end_a_run_that_saves(exits, capsys, signals, code):
    stop = preemption.Stop()
    stop.hold()
    for name in signals.split():
        stop._handle(signal.Signals[name])
    assert exits == [code] * (code is not None)
    assert capsys.readouterr().err.count("saving, then leaving") == 1


def test_where_hangups_are_ignored_they_stay_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with preemption.Stop() as stop:
        stop.hold()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_what_is_saved_is_not_said_to_be_nothing():
    reasons: list[str] = []
    stop = preemption.Stop()
    stop.leave = reasons.append
    stop._handle(signal.SIGTERM)
    stop = preemption.Stop()
    stop.leave = reasons.append
    stop.hold()
    stop.release()
    stop._handle(signal.SIGTERM)
    assert reasons == ["SIGTERM: there is nothing to save", "SIGTERM: the last step is saved"]


def test_another_thread_leaves_handlers_alone(own_handlers):
    restored = []

    def work() -> None:
        with preemption.Stop() as stop:
            stop.hold()
            restored.extend(signal.getsignal(number) is handler for number, handler in own_handlers.items())
            stop.release()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert restored == [True, True, True]
