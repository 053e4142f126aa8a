"""How a port stops listening without losing the clients that are on their way to it.

The kernel makes connections before the server has accepted them, and resets those when the listening socket is closed.
So nobody new is let in first: TCP's first packets are dropped, and the file of a unix socket is removed. A client whose
packet is dropped sends it again a second later, when the port is closed: it is refused, and has sent no request yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import struct
from collections.abc import Iterable

# Until clients whose connections are half made have made them: some round trips of a data centre.
HANDSHAKE_S = 0.03
# Clients that connect without end must not keep the server from draining.
ACCEPT_WAITING_MAX_S = 1.0

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
# Classic BPF, on the TCP header: drop what has SYN and not ACK.
_FLAGS_OFFSET, _SYN, _ACK = 13, 0x02, 0x10
_DROP_FIRST_PACKETS = (
    (0x30, 0, 0, _FLAGS_OFFSET),  # load the byte
    (0x54, 0, 0, _SYN | _ACK),  # and
    (0x15, 0, 1, _SYN),  # if equal: the next, else the one after it
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # take
)

FileIdentity = tuple[int, int]


def file_identities(sockets: Iterable[socket.socket]) -> dict[str, FileIdentity]:
    """Device and inode of the files of those that are unix sockets, by path."""
    found = {}
    for sock in sockets:
        if sock.family == socket.AF_UNIX:
            with contextlib.suppress(OSError):
                status = os.lstat(sock.getsockname())
                found[sock.getsockname()] = status.st_dev, status.st_ino
    return found


async def accept_last(sockets: Iterable[socket.socket], files: dict[str, FileIdentity]) -> None:
    """Lets nobody new connect to ``sockets``; returns when those who had connected are accepted.

    REQUIRES: the loop accepts from them.

    Args:
        files: see `file_identities`; made when nobody else could have taken their paths.
    """
    import asyncio  # here: the supervisor, which has no loop, takes `let_in_again`

    every = set(sockets)
    for sock in every:
        if sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):  # a sandbox without filters: a client may be reset
                _drop_first_packets(sock)
    for path, identity in file_identities(every).items():
        if files.get(path) == identity:
            with contextlib.suppress(OSError):
                os.unlink(path)
    await asyncio.sleep(HANDSHAKE_S)
    waiting = select.poll()
    for sock in every:
        waiting.register(sock.fileno(), select.POLLIN)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + ACCEPT_WAITING_MAX_S
    while waiting.poll(0) and loop.time() < deadline:  # noqa: ASYNC110 - each turn of the loop accepts some
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # the last one's connection_made


def let_in_again(listener: socket.socket) -> None:
    """Undoes for a TCP socket what `accept_last` did, maybe in a process that has ended: the next one listens to it."""
    with contextlib.suppress(OSError):  # nothing was done
        listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def _drop_first_packets(sock: socket.socket) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in _DROP_FIRST_PACKETS))
    program = struct.pack("HL", len(_DROP_FIRST_PACKETS), ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
