"""How TLS connections end: whole answers for slow readers, no waiting for those who never say goodbye."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from pyserve.config.config import Config
from pyserve.http1.connections import Connections
from pyserve.http1.limits import Http1Limits
from pyserve.http1.tls import Http1TlsProtocol
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Response
from pyserve.security import tls
from tests.support import certificates

LIMIT_S = 60.0
BIG = 6 << 20


class TlsServer:
    """Http1TlsProtocol on a loop in a thread of its own.

    Attributes:
        kept: exchanges of ``/keep``, which are not answered.
    """

    def __init__(self, folder: Path):
        pair = certificates.self_signed(folder)
        config = Config(private_key_file=str(pair.key), certificate_file=str(pair.certificate))
        self.kept: list[Exchange] = []
        self.gone = threading.Event()
        self.arrived = threading.Event()
        self.limits = Http1Limits(body_size_max=1000)
        self.connections = Connections(self.limits)
        self.loop = uvloop.new_event_loop()
        self._context = tls.server_context(config)
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self._server = self.call(self._open())
        self.address: tuple[str, int] = self._server.sockets[0].getsockname()

    async def _open(self) -> asyncio.AbstractServer:
        return await self.loop.create_server(
            lambda: Http1TlsProtocol(self._app, self.limits, self.connections), "127.0.0.1", 0,
            ssl=self._context, ssl_handshake_timeout=LIMIT_S, ssl_shutdown_timeout=LIMIT_S,
        )  # fmt: skip

    def _app(self, exchange: Exchange) -> None:
        if exchange.request.path == "/keep":
            exchange.on_disconnect = self.gone.set
            self.kept.append(exchange)
            self.arrived.set()
        else:
            exchange.respond(Response(200, bytes(BIG if exchange.request.path == "/big" else 2)))

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(LIMIT_S)

    async def _do(self, action: Callable[[], object]) -> object:
        return action()

    def do(self, action: Callable[[], object]) -> object:
        """Runs ``action`` on the loop."""
        return self.call(self._do(action))

    def connect(self) -> ssl.SSLSocket:
        return ssl._create_unverified_context().wrap_socket(socket.create_connection(self.address, LIMIT_S))

    def close(self) -> None:
        self.do(self._server.close)
        self.do(self.connections.abort)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(LIMIT_S)
        self.loop.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TlsServer]:
    made = TlsServer(tmp_path)
    yield made
    made.close()


def request(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def read_all(client: ssl.SSLSocket) -> bytes:
    """Up to the alert that ends the connection; without one this raises."""
    client.suppress_ragged_eofs = False
    content = bytearray()
    while chunk := client.recv(65536):
        content += chunk
    return bytes(content)


def test_reader_that_comes_late_gets_the_whole_answer_and_a_proper_end(server: TlsServer) -> None:
    with server.connect() as slow:
        slow.sendall(request("/big", "Connection: close"))
        for _ in range(20):  # others are served meanwhile; the answer waits in buffers of ours
            with server.connect() as quick:
                quick.sendall(request("/", "Connection: close"))
                assert read_all(quick).endswith(b"\r\n\r\n\0\0")
        assert len(read_all(slow).partition(b"\r\n\r\n")[2]) == BIG


def test_answers_of_one_connection_come_in_order(server: TlsServer) -> None:
    with server.connect() as client:
        client.sendall(request("/") * 10 + request("/big", "Connection: close"))
        content = read_all(client)
    assert content.count(b"HTTP/1.1 200") == 11 and len(content) > BIG


def test_idle_clients_that_say_nothing_are_hung_up_on(server: TlsServer) -> None:
    clients = [server.connect() for _ in range(5)]
    for client in clients:
        client.sendall(request("/"))
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
    server.call(server.connections.drain())  # returns although no client says goodbye
    assert len(server.connections) == 0
    for client in clients:
        assert read_all(client) == b""
        client.close()


def test_refused_upload_is_told_why(server: TlsServer) -> None:
    with server.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n" + bytes(500_000))
        assert b"413" in read_all(client).partition(b"\r\n")[0]


def test_client_that_goes_away_gives_up_its_request(server: TlsServer, caplog: pytest.LogCaptureFixture) -> None:
    with server.connect() as client:
        client.sendall(request("/keep") * 8)
        assert server.arrived.wait(LIMIT_S)
        client.settimeout(0)
        with pytest.raises(ssl.SSLWantReadError):
            client.unwrap()  # says goodbye
        assert server.gone.wait(LIMIT_S)
    for exchange in server.kept:
        server.do(lambda exchange=exchange: exchange.respond(Response(200, b"late")))
    server.call(server.connections.drain())
    assert not caplog.records


def test_client_that_breaks_off_is_forgotten(server: TlsServer) -> None:
    client = server.connect()
    client.sendall(request("/keep"))
    assert server.arrived.wait(LIMIT_S)
    raw = socket.socket(fileno=client.detach())
    raw.close()
    assert server.gone.wait(LIMIT_S)
    server.call(server.connections.drain())
