"""A port that stops listening: those on their way are accepted, and nobody else."""

from __future__ import annotations

import asyncio
import errno
import select
import socket
from pathlib import Path

import pytest

from pyserve.config.address import Address
from pyserve.server.last_clients import FileIdentity, accept_last, file_identities
from pyserve.server.listeners import Listeners

LIMIT_S = 60.0


class Counting(asyncio.Protocol):
    """Counts connections in ``made``."""

    def __init__(self, made: list[asyncio.BaseTransport]):
        self._made = made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._made.append(transport)


async def close_under(
    listener: socket.socket, clients: list[socket.socket], late: socket.socket, files: dict[str, FileIdentity]
) -> tuple[int, int]:
    """Closes ``listener`` under ``clients``, who are waiting, while ``late`` comes. Returns how many were accepted, and
    what became of the late one's call at once (errno)."""
    made: list[asyncio.BaseTransport] = []
    address = listener.getsockname()
    server = await asyncio.get_running_loop().create_server(lambda: Counting(made), sock=listener, start_serving=False)
    for client in clients:
        client.connect(address)
    await server.start_serving()
    await accept_last([listener], files)
    late.setblocking(False)
    error = late.connect_ex(address)
    for _ in range(10):
        await asyncio.sleep(0)
    server.close()
    for transport in made:
        transport.abort()  # type: ignore[attr-defined]
    return len(made), error


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_who_has_connected_is_accepted_and_who_comes_later_is_refused_before_it_can_send(
    family: int, host: str
) -> None:
    listener = socket.socket(family)
    listener.bind((host, 0))
    listener.listen(64)
    clients = [socket.socket(family) for _ in range(40)]
    late = socket.socket(family)
    count, error = asyncio.run(asyncio.wait_for(close_under(listener, clients, late, {}), LIMIT_S))
    assert (count, error) == (40, errno.EINPROGRESS)
    assert select.select([], [late], [], LIMIT_S)[1]
    assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED  # not reset, which comes later
    for sock in (late, *clients):
        sock.close()


def test_the_file_of_a_unix_socket_goes_first(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen(64)
    clients = [socket.socket(socket.AF_UNIX) for _ in range(40)]
    late = socket.socket(socket.AF_UNIX)
    files = file_identities([listener])
    count, error = asyncio.run(asyncio.wait_for(close_under(listener, clients, late, files), LIMIT_S))
    assert (count, error) == (40, errno.ENOENT)
    for sock in (late, *clients):
        sock.close()


def test_the_file_of_another_server_s_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener, other = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    files = file_identities([listener])
    path.rename(tmp_path / "moved")
    other.bind(str(path))
    other.listen()
    late = socket.socket(socket.AF_UNIX)
    count, error = asyncio.run(asyncio.wait_for(close_under(listener, [], late, files), LIMIT_S))
    assert (count, error) == (0, 0) and path.exists()
    for sock in (late, other):
        sock.close()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_the_next_server_on_the_same_sockets_is_reached(kind: str, tmp_path: Path) -> None:
    address = Address.parse("http://127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/socket", 0)
    listeners = Listeners()
    listeners._add("inference", address, "", 0)
    listeners._add("management", listeners.addresses["inference"], "", 0)
    listener = listeners.sockets["inference"]
    name = listener.getsockname()

    async def stop_listening() -> None:
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, sock=listener.dup())
        await accept_last([listener], file_identities([listener]))
        server.close()

    asyncio.run(asyncio.wait_for(stop_listening(), LIMIT_S))
    client = socket.socket(listener.family)
    client.setblocking(False)
    assert client.connect_ex(name) == (errno.EINPROGRESS if kind == "tcp" else errno.ENOENT)
    client.close()
    listeners.reopen()
    with socket.socket(listener.family) as client:
        client.settimeout(LIMIT_S)
        client.connect(name)
        accepted, _ = listeners.sockets["management"].accept()
        accepted.close()
    assert len(set(listeners.sockets.values())) == 1 and listeners.sockets["inference"].getsockname() == name
    listeners.close()
    assert kind == "tcp" or not (tmp_path / "socket").exists()
