"""HTTP requests sent as bytes, and answers as they were on the wire."""

from __future__ import annotations

import http.client
import json
from typing import Any, NamedTuple

from tests.support.serving import Server


class Raw(NamedTuple):
    """An answer as it was on the wire."""

    version: str
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes
    is_closed: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


def exchange(server: Any, request: bytes, port: str = "inference") -> Raw:
    """Sends ``request`` as it is; the answer, and whether the server then closed the connection, which for an open one
    is found by a second request. ``server`` is a `Server`, or has an ``exchange`` of its own."""
    if not isinstance(server, Server):
        answered: Raw = server.exchange(request, port)
        return answered
    with server.connect(port) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection, method=request.split(b" ", 1)[0].decode())
        answer.begin()
        body = answer.read()
        is_closed = answer.will_close
        if not is_closed:
            connection.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            is_closed = not connection.recv(1)
        version = "HTTP/1.1" if answer.version == 11 else "HTTP/1.0"
        return Raw(version, answer.status, answer.reason, answer.getheaders(), body, is_closed)


def request(method: str, target: str, body: bytes = b"", *lines: str, version: str = "1.1") -> bytes:
    head = [f"{method} {target} HTTP/{version}", "Host: localhost", *lines]
    if body:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body
