"""What is answered natively over real sockets: with TLS, to clients that read slowly, on both event loops."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop

from pyserve.http1.fast_protocol import FastTlsProtocol
from pyserve.http1.protocol import Http1Protocol
from pyserve.http1.tls import Http1TlsProtocol
from tests.fronts.test_fast_keys import Wide
from tests.fronts.test_fast_path import ITEM, JSON, RAW, binary
from tests.support import certificates
from tests.support.networks import Gate, Identity
from tests.support.packing import pack
from tests.support.two_ways import HANG_S, Site, post, site

_DATE = re.compile(rb"(?<=\r\nDate: )[^\r]*")
_SIZE = re.compile(rb"\r\ncontent-length: ([0-9]+)\r\n", re.IGNORECASE)
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def run_on(loop_name: str, test: Coroutine[Any, Any, None]) -> None:
    loop = LOOPS[loop_name]()
    try:
        loop.run_until_complete(asyncio.wait_for(test, 2 * HANG_S))
    finally:
        loop.close()


def _binary(wants_binary: bool) -> tuple[str, tuple[str, ...], bytes]:
    return binary(wants_binary=wants_binary)


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    size = _SIZE.search(head)
    return _DATE.sub(b"DATE", head) + (await reader.readexactly(int(size[1])) if size is not None else b"")


class Listeners:
    """The two ways of a site, over TLS; a context."""

    def __init__(self, made: Site, folder: Path):
        pair = certificates.self_signed(folder)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(pair.certificate, pair.key)
        self._made = made
        self._servers: list[asyncio.Server] = []

    async def __aenter__(self) -> Listeners:
        made, loop = self._made, asyncio.get_running_loop()
        slow = made.slow._protocol()
        makers: list[Callable[[], Http1Protocol]] = [
            partial(made.path.protocol, FastTlsProtocol),
            partial(Http1TlsProtocol, slow._app, made.slow.connections.limits, made.slow.connections),
        ]
        for make in makers:
            self._servers.append(await loop.create_server(make, "127.0.0.1", 0, ssl=self.context))
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
        for way in (self._made.fast, self._made.slow):
            way.connections.abort()
        await asyncio.sleep(0)

    async def connect(self, number: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        port = self._servers[number].sockets[0].getsockname()[1]
        return await asyncio.open_connection("127.0.0.1", port, ssl=ssl._create_unverified_context())


@pytest.mark.parametrize("loop_name", LOOPS)
def test_over_tls(store: Path, tmp_path: Path, loop_name: str) -> None:
    """Kept connections: whole requests, in pieces, two at once, half of one behind another, and a client's end."""
    pack(store, network=Identity())

    async def test() -> None:
        async with site(store) as made, Listeners(made, tmp_path) as listeners:
            requests = [
                post("/predictions/m", ITEM, RAW), post("/predictions/m", b"[1, 2, 3, 4]", JSON), post("/none", b""),
                *(post(path, body, *lines) for path, lines, body in map(_binary, (True, False))),
            ]  # fmt: skip
            told: list[list[bytes]] = []
            for number in (0, 1):
                reader, writer = await listeners.connect(number)
                seen = []
                for request in requests:
                    writer.write(request)
                    seen.append(await read_answer(reader))
                    writer.write(request[:-3])
                    await writer.drain()
                    await asyncio.sleep(0)
                    writer.write(request[-3:] + requests[0])
                    seen += [await read_answer(reader), await read_answer(reader)]
                writer.close()
                told.append(seen)
            assert told[0] == told[1] and made.taken >= 4
            await made.until(lambda: not len(made.fast.connections))
            assert made.fast.connections.budget.size == 0

    run_on(loop_name, test())


@pytest.mark.parametrize("loop_name", LOOPS)
def test_a_client_over_tls_that_goes_while_its_request_runs(
    store: Path, gate: Gate, tmp_path: Path, loop_name: str
) -> None:
    async def test() -> None:
        async with site(store, gate=gate) as made, Listeners(made, tmp_path) as listeners:
            gate.shut()
            _, writer = await listeners.connect(0)
            writer.write(post("/predictions/m", ITEM, RAW))
            await made.until(lambda: made.taken == 1)
            writer.transport.abort()
            await made.until(lambda: made.lane("m").in_flight_count == 0 and made.fast.connections.budget.size == 0)
            gate.open()
            reader, writer = await listeners.connect(0)
            writer.write(post("/predictions/m", ITEM, RAW))
            assert (await read_answer(reader)).endswith(struct.pack("<4f", 2, -5, 6, 0.25))
            writer.close()

    run_on(loop_name, test())


@pytest.mark.parametrize("loop_name", LOOPS)
def test_a_client_that_reads_slowly_gets_all(store: Path, loop_name: str) -> None:
    """Large answers wait for it, and so do its next requests; nothing is lost or mixed up."""
    pack(store, network=Wide(50_000))  # 800 KB
    rounds = 6

    async def test() -> None:
        async with site(store) as made:
            loop, told = asyncio.get_running_loop(), []
            for make in (made.path.protocol, made.slow._protocol):
                server = await loop.create_server(make, "127.0.0.1", 0)
                with socket.socket() as client:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    client.setblocking(False)
                    await loop.sock_connect(client, server.sockets[0].getsockname())
                    for number in range(rounds):
                        body = struct.pack("<4f", number, 0, 0, 0)
                        await loop.sock_sendall(client, post("/predictions/m", body, RAW, id=f"n{number}"))
                        await asyncio.sleep(0.01)
                    await loop.sock_sendall(client, post("/none", b"", "Connection: close"))
                    data = b""
                    while piece := await loop.sock_recv(client, 1 << 16):
                        data += piece
                    told.append(_DATE.sub(b"DATE", data))
                server.close()
            assert len(told[0]) == len(told[1]) > rounds * 800_000 and told[0] == told[1] and made.taken > 0

    run_on(loop_name, test())
