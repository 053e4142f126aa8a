"""A web server that does what it is told, also what no honest one would; counts who comes."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LIMIT_S = 60.0

Answer = bytes | Callable[["Peer"], None]


class Peer:
    """One client, as an answer sees it."""

    def __init__(self, sock: socket.socket, head: str):
        self.sock = sock
        self.head = head
        self.target = head.split(" ")[1]

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def wait_until_gone(self) -> None:
        """Returns when the client has hung up."""
        with contextlib.suppress(OSError):
            while self.sock.recv(4096):
                pass


class HostileWeb:
    """Answers by path on 127.0.0.1; a context.

    Args:
        answers: bytes, sent as they are, or what talks to the client; more may be added while it runs.
        context: speaks TLS.
        greeting: said at once, and then no more.

    Attributes:
        connection_count: how many have come.
        requests: head of each request.
    """

    def __init__(self, answers: dict[str, Answer] | None = None, context: ssl.SSLContext | None = None,
                 greeting: bytes = b""):  # fmt: skip
        self.answers = answers or {}
        self.connection_count = 0
        self.requests: list[str] = []
        self._context = context
        self._greeting = greeting
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._peers: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def url(self) -> str:
        return f"http{'s' if self._context else ''}://127.0.0.1:{self.port}"

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connection_count += 1
            sock.settimeout(LIMIT_S)
            self._peers.add(sock)
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        plain = sock
        try:
            with contextlib.suppress(OSError):
                if self._context is not None:
                    sock = self._context.wrap_socket(sock, server_side=True)
                    self._peers.add(sock)
                if self._greeting:
                    sock.sendall(self._greeting)
                    return
                head = b""
                while b"\r\n\r\n" not in head:
                    received = sock.recv(65536)
                    if not received:
                        return
                    head += received
                peer = Peer(sock, head.decode("latin-1"))
                self.requests.append(peer.head)
                answer = self.answers.get(peer.target.partition("?")[0], b"HTTP/1.1 404 Not Found\r\n"
                                          b"Content-Length: 0\r\n\r\n")  # fmt: skip
                if callable(answer):
                    answer(peer)
                else:
                    peer.send(answer)
        finally:
            sock.close()
            plain.close()

    def __enter__(self) -> HostileWeb:
        self._threads[0].start()
        return self

    def __exit__(self, *_: Any) -> None:
        for sock in (self._listener, *self._peers):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()


def file_answer(content: bytes, *headers: str) -> bytes:
    lines = [f"Content-Length: {len(content)}", "Connection: close", *headers]
    return "\r\n".join(["HTTP/1.1 200 OK", *lines, "", ""]).encode() + content


def chunked_answer(content: bytes, size: int = 1000) -> bytes:
    parts = [content[start : start + size] for start in range(0, len(content), size)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def redirect(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


def endless(peer: Peer) -> None:
    peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        peer.send(b"x" * 65536)


def one_byte_then_nothing(peer: Peer) -> None:
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nx")
    peer.wait_until_gone()


def endless_head(peer: Peer) -> None:
    peer.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        peer.send(b"X-More: 1\r\n" * 50)


def silence(peer: Peer) -> None:
    peer.wait_until_gone()


@contextmanager
def canary() -> Iterator[HostileWeb]:
    """A listener that nobody may come to."""
    with HostileWeb() as web:
        yield web
        assert web.connection_count == 0
