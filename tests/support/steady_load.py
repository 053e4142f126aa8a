"""Clients that ask one address all the time, by connections that they keep and by new ones, and count what they get.

Nothing is sent again, and a connection that is refused counts, too. A kept connection is looked at before it is used
again: one that the server has ended between two requests is dropped, as libraries for clients do.
"""

from __future__ import annotations

import http.client
import random
import select
import socket
import threading
from collections import Counter
from typing import TypeVar

from tests.support.serving import LIMIT_S

C = TypeVar("C", bound="ClientThreads")

# How long kept connections rest between two requests, s.
PAUSES_S = (0.0, 0.0, 0.005, 0.05, 0.4)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str):
        super().__init__("localhost", timeout=LIMIT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(LIMIT_S)
        self.sock.connect(self._path)


ECHO = """
def handle(data, context):
    return None if data is None else [bytes(row.get("body") or b"") for row in data]
"""


def has_ended(connection: http.client.HTTPConnection) -> bool:
    """Whether the server has closed a connection that waits for nothing."""
    return bool(select.select([connection.sock], [], [], 0)[0])


class ClientThreads:
    """Clients in threads, which ask until the end of the context."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._threads: list[threading.Thread] = []

    def _rest(self, pause_s: float, chance: random.Random | None = None) -> None:
        """``pause_s`` on average."""
        if pause_s:
            self._ends.wait((chance or random).expovariate(1 / pause_s))

    def __enter__(self: C) -> C:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(LIMIT_S)


class SteadyLoad(ClientThreads):
    """A context, at whose end the clients have stopped.

    Args:
        address: host and port, or the path of a unix socket.
        path: what is asked by POST; it is to answer with what it was sent.

    Attributes:
        answers: what came, by status; what came in place of an answer, by its text.
        closed: answers that said that their connection is closed.
        dropped: kept connections that had ended between two requests.
    """

    def __init__(self, address: tuple[str, int] | str, path: str):
        super().__init__()
        self.answers: Counter[str] = Counter()
        self.closed = self.dropped = 0
        self._address = address
        self._path = path
        kept = [threading.Thread(target=self._keep, args=(pause_s,)) for pause_s in PAUSES_S]
        self._threads = [*kept, *(threading.Thread(target=self._renew) for _ in range(2))]

    @property
    def count(self) -> int:
        """How many were answered."""
        return self.answers["200"]

    def _connection(self) -> http.client.HTTPConnection:
        if isinstance(self._address, str):
            return _UnixConnection(self._address)
        return http.client.HTTPConnection(*self._address, timeout=LIMIT_S)

    def _ask(self, connection: http.client.HTTPConnection) -> bool:
        """Whether the connection can be used again."""
        body = random.randbytes(random.randrange(2000))
        stays = False
        try:
            connection.request("POST", self._path, body, {"Content-Type": "application/octet-stream"})
            answer = connection.getresponse()
            came = answer.read()
            end = str(answer.status) if answer.status != 200 or came == body else "another one's answer"
            stays = connection.sock is not None
        except (OSError, http.client.HTTPException) as error:
            end = f"{type(error).__name__}: {error}"
        with self._lock:
            self.answers[end] += 1
            self.closed += end == "200" and not stays
        return stays

    def _keep(self, pause_s: float) -> None:
        connection = self._connection()
        while not self._ends.is_set():
            if connection.sock is not None and has_ended(connection):
                connection.close()
                with self._lock:
                    self.dropped += 1
            if not self._ask(connection):
                connection.close()
                connection = self._connection()
            self._rest(pause_s)
        connection.close()

    def _renew(self) -> None:
        while not self._ends.is_set():
            connection = self._connection()
            self._ask(connection)
            connection.close()
            self._ends.wait(0.005)
