"""A connection that has ended leaves nothing for the garbage collector: over TLS that is 57 KB each."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import weakref
from pathlib import Path

import pytest
import uvloop

from pyserve.config.config import Config
from pyserve.http1.connections import Connections
from pyserve.http1.limits import Http1Limits
from pyserve.http1.protocol import Http1Protocol
from pyserve.http1.tls import Http1TlsProtocol
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Response
from pyserve.security import tls
from tests.support import certificates

ENDS = {
    "the server's": b"GET /ping HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "the client's": b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "within a body": b"POST /ping HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500000\r\n\r\n" + bytes(100_000),
    "before a head": b"",
    "of nonsense": b"nonsense\r\n\r\n",
}


def visit(address: tuple[str, int], sent: bytes, context: ssl.SSLContext | None) -> None:
    """Three times."""
    for _ in range(3):
        client = socket.create_connection(address, timeout=60)
        if context is not None:
            client = context.wrap_socket(client, server_hostname="localhost")
        client.sendall(sent)
        if sent and sent.endswith(b"\r\n\r\n"):
            assert client.recv(1000)
        client.close()


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("over_tls", [False, True], ids=["plain", "tls"])
def test_nothing_is_left_of_a_connection(tmp_path: Path, end: str, over_tls: bool) -> None:
    server_tls = client_tls = None
    if over_tls:
        pair = certificates.self_signed(tmp_path)
        server_tls = tls.server_context(Config(private_key_file=str(pair.key), certificate_file=str(pair.certificate)))
        client_tls = ssl.create_default_context(cafile=str(pair.certificate))

    async def test() -> None:
        protocols: list[weakref.ref[Http1Protocol]] = []
        limits = Http1Limits()
        connections = Connections(limits)

        def answer(exchange: Exchange) -> None:
            exchange.respond(Response(200, b"ok"))

        def connected() -> Http1Protocol:
            protocol = (Http1TlsProtocol if over_tls else Http1Protocol)(answer, limits, connections)
            protocols.append(weakref.ref(protocol))
            return protocol

        loop = asyncio.get_running_loop()
        server = await loop.create_server(connected, "127.0.0.1", 0, ssl=server_tls)
        address = server.sockets[0].getsockname()
        await asyncio.to_thread(visit, address, ENDS[end], client_tls)
        async with asyncio.timeout(60):
            while len(protocols) < 3 or any(each() is not None for each in protocols):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        server.close()

    gc.collect()
    gc.disable()
    try:
        uvloop.run(test())
    finally:
        gc.enable()
