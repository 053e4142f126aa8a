"""A bare HTTP/1.1 client that sees everything: cut answers, bytes that nobody asked for, connections that end."""

from __future__ import annotations

import socket
import ssl
from typing import NamedTuple

from tests.chaos import ledger

LIMIT_S = 40.0
_READ_SIZE = 1 << 16


class Failure(Exception):
    """A request without a whole answer.

    Attributes:
        outcome: as in `tests.chaos.ledger`.
    """

    def __init__(self, outcome: str, detail: str):
        super().__init__(detail)
        self.outcome = outcome


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class HttpClient:
    """One kept connection to ``address``; one request at a time."""

    def __init__(self, address: tuple[str, int], *, is_tls: bool, limit_s: float = LIMIT_S):
        self._address = address
        self._tls = ssl._create_unverified_context() if is_tls else None
        self._limit_s = limit_s
        self._socket: socket.socket | None = None
        self._rest = b""

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._rest = None, b""

    def is_open(self) -> bool:
        """Whether the next request goes through the connection of the last one."""
        if self._socket is not None:
            self._check_is_quiet(self._socket)
        return self._socket is not None

    def ask(self, method: str, path: str, body: bytes = b"", *headers: tuple[str, str]) -> Reply:
        """Sends one request and reads its answer.

        Raises:
            Failure: there is none, or only a part of it, or more than it.
        """
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers]
        try:
            reply = self._exchange("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        except Failure:
            self.close()
            raise
        if reply.headers.get("connection") == "close":
            self.close()
        return reply

    def _exchange(self, request: bytes) -> Reply:
        connection = self._connected()
        try:
            connection.sendall(request)
        except TimeoutError as error:
            raise Failure(ledger.HUNG, f"while sending: {error}") from None
        except OSError as error:
            if not self._has_bytes(connection):  # an early answer may still be there to be read
                raise Failure(ledger.LOST, f"while sending: {error!r}") from None
        return self._read_reply(connection)

    def _connected(self) -> socket.socket:
        if self._socket is not None:
            self._check_is_quiet(self._socket)
        if self._socket is None:
            try:
                made = socket.create_connection(self._address, self._limit_s)
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socket = self._tls.wrap_socket(made) if self._tls else made
            except OSError as error:
                raise Failure(ledger.UNREACHABLE, repr(error)) from None
            self._rest = b""
        return self._socket

    def _check_is_quiet(self, connection: socket.socket) -> None:
        """Closes a connection that has ended meanwhile; one that says something unasked is a failure."""
        connection.settimeout(0)
        try:
            said = self._rest + connection.recv(_READ_SIZE)
        except (BlockingIOError, ssl.SSLWantReadError):
            said = self._rest
            connection.settimeout(self._limit_s)
        except OSError:
            said = self._rest
            self.close()
        else:
            self.close()
        if said:
            raise Failure(ledger.DOUBLED, f"unasked: {said[:300]!r}")

    @staticmethod
    def _has_bytes(connection: socket.socket) -> bool:
        try:
            return bool(connection.recv(1, socket.MSG_PEEK)) if not isinstance(connection, ssl.SSLSocket) else False
        except OSError:
            return False

    def _more(self, connection: socket.socket, so_far: bytes) -> bytes:
        """What comes next; never nothing."""
        outcome = ledger.CUT if so_far else ledger.LOST
        try:
            piece = connection.recv(_READ_SIZE)
        except TimeoutError:
            raise Failure(ledger.HUNG, f"after {so_far[:200]!r}") from None
        except OSError as error:
            raise Failure(outcome, f"{error!r} after {so_far[:200]!r}") from None
        if not piece:
            raise Failure(outcome, f"the end after {so_far[:200]!r}")
        return piece

    def _read_reply(self, connection: socket.socket) -> Reply:
        data = self._rest
        while b"\r\n\r\n" not in data:
            data += self._more(connection, data)
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        status = int(first.split(" ", 2)[1])
        if headers.get("transfer-encoding") == "chunked":
            body, data = self._read_chunks(connection, head, data)
        else:
            size = int(headers.get("content-length", 0))
            pieces, there = [data], len(data)
            while there < size:
                pieces.append(self._more(connection, head))
                there += len(pieces[-1])
            data = b"".join(pieces)
            body, data = data[:size], data[size:]
        self._rest = data
        return Reply(status, headers, body)

    def _read_chunks(self, connection: socket.socket, head: bytes, data: bytes) -> tuple[bytes, bytes]:
        body = b""
        while True:
            while b"\r\n" not in data:
                data += self._more(connection, head)
            line, _, data = data.partition(b"\r\n")
            size = int(line.split(b";")[0], 16)
            while len(data) < size + 2:
                data += self._more(connection, head)
            body, data = body + data[:size], data[size + 2 :]
            if size == 0:
                return body, data
