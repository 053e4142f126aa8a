"""Clients that behave badly: they reset, dribble, do not read, say nothing, or announce what never comes.

They come from an address of their own, as another machine would. None of the ledger's requests may notice them.
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
import threading

from tests.chaos.fault import Fault
from tests.chaos.site import Site

_ADDRESS = "127.0.0.2"
_HEAD = b"POST /predictions/echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"


class _BadClients(Fault):
    """Connections that stay until the fault is healed, and one thread that plays them."""

    is_harmless = True
    weight = 12
    count = 20

    def __init__(self, site: Site, chance: random.Random):
        super().__init__(site, chance)
        self.connections: list[socket.socket] = []
        self.is_over = threading.Event()
        self._thread = threading.Thread(target=self._play, name=self.name)

    def inject(self) -> None:
        self._thread.start()

    def heal(self) -> None:
        self.is_over.set()
        self._thread.join()
        for connection in self.connections:
            connection.close()
        self.connections.clear()

    def _play(self) -> None:
        with contextlib.suppress(OSError):
            self.play()

    def play(self) -> None:
        raise NotImplementedError

    def connect(self, *, receive_buffer: int = 0) -> socket.socket:
        connection = socket.socket()
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(10)
        connection.bind((_ADDRESS, 0))
        connection.connect(self.site.address())
        if self.site.is_tls:
            connection = ssl._create_unverified_context().wrap_socket(connection)
        self.connections.append(connection)
        return connection


class ResetFlood(_BadClients):
    """Connections that are reset: at once, within the head, within the body, and after the request."""

    name = "reset-flood"
    count = 150

    def play(self) -> None:
        body = b"x" * 5000
        request = _HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
        for _ in range(self.count):
            with contextlib.suppress(OSError):
                connection = self.connect()
                connection.sendall(
                    request[: self.chance.choice((0, 1, 40, len(_HEAD), len(_HEAD) + 500, len(request)))]
                )
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
            self.connections.clear()
            if self.is_over.is_set():
                return


class SlowWriters(_BadClients):
    """Connections that send a byte now and then."""

    name = "slow-writers"

    def play(self) -> None:
        request = _HEAD + b"Content-Length: 100000\r\n\r\n" + bytes(100_000)
        open_ones = [self.connect() for _ in range(self.count)]
        place = 0
        while not self.is_over.wait(0.01):
            for connection in open_ones:
                with contextlib.suppress(OSError):
                    connection.send(request[place : place + 1])
            place += 1


class SlowReaders(_BadClients):
    """Connections that ask for much and do not read it."""

    name = "slow-readers"

    def play(self) -> None:
        body = bytes(200_000)
        request = _HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
        for _ in range(self.count):
            with contextlib.suppress(OSError):
                self.connect(receive_buffer=4096).sendall(request)
            if self.is_over.is_set():
                return
        self.is_over.wait()


class HalfOpen(_BadClients):
    """Connections that say nothing, and some that closed their half after a request and never read."""

    name = "half-open"
    count = 60

    def play(self) -> None:
        for number in range(self.count):
            with contextlib.suppress(OSError):
                connection = self.connect()
                if number % 3 == 0:
                    connection.sendall(_HEAD + b"Content-Length: 4\r\n\r\nhalf")
                    if not self.site.is_tls:
                        connection.shutdown(socket.SHUT_WR)
        self.is_over.wait()


class Announcers(_BadClients):
    """More bodies are announced than fit into the budget of bodies, and none is sent."""

    name, weight = "announced-bodies", 6
    count = 60

    def play(self) -> None:
        for _ in range(self.count):
            with contextlib.suppress(OSError):
                self.connect().sendall(_HEAD + b"Content-Length: 6500000\r\n\r\n")
        self.is_over.wait()
