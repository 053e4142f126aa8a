"""Ports for tests that must know a number before anything listens on it."""

from __future__ import annotations

import itertools
import os
import random
import socket

# Below those that the kernel gives to whoever binds port 0 or connects: a test or server beside this one can only come
# by one of these if it asks for that very number.
_NUMBERS = range(12_000, 32_000)
_random = random.Random(os.getpid())  # not the random numbers that tests seed


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nothing listens, and which nobody gets who does not name it."""
    for port in itertools.islice(iter(lambda: _random.choice(_NUMBERS), None), 1000):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise AssertionError("no port is free")
