"""Ports of this machine for the processes of a run."""

import contextlib
import random
import socket


def free_ports() -> int:
    """A port that is free, as is the next one. Outgoing connections get 32768 and up on Linux, and so take neither."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000, 2)
        first, second = ("127.0.0.1", port), ("127.0.0.1", port + 1)
        with contextlib.suppress(OSError), socket.create_server(first), socket.create_server(second):
            return port
