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
    mine = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
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


def test_a_signal_while_work_is_unsaved_is_only_noted(capsys):
    with preemption.Stop() as stop:
        stop.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + 10
        while not stop.requested and time.monotonic() < end:
            time.sleep(0.01)
        assert stop.requested
    assert "SIGTERM: saving, then leaving" in capsys.readouterr().err


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
    assert restored == [True, True]
