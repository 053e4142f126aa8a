"""What can be learnt of the other end of a connection."""

from __future__ import annotations

import array
import asyncio
import fcntl
import termios

# A client that hangs up and one that only sends no more look alike: both close their side. What they do with something
# sent to them tells them apart, as the first one's system resets the connection. So, while such a client's answer is
# being worked on, it is sent "100 Continue", which HTTP/1.1 clients read over (RFC 9110, 15.2): after so many seconds,
# and again, since what is written after a reset is what shows it.
PROBE_PAUSES_S = (1.0, 0.25, 2.0, 5.0, 10.0, 30.0)


def probe_pause_s(count: int) -> float:
    """How long to wait after ``count`` probes."""
    return PROBE_PAUSES_S[min(count, len(PROBE_PAUSES_S) - 1)]


def unread_size(transport: asyncio.Transport) -> int:
    """Bytes that have arrived and are still with the kernel."""
    sock = transport.get_extra_info("socket")
    if sock is None or transport.is_closing():
        return 0
    count = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.FIONREAD, count)
    return count[0]


def descriptor_of(transport: asyncio.BaseTransport) -> int:
    """The number of its descriptor; -1 if it has none."""
    sock = transport.get_extra_info("socket")
    return -1 if sock is None else int(sock.fileno())


def client_name(peer: object) -> str:
    """``"127.0.0.1:43090"``, ``"[::1]:43090"``, or ``"unix"``, of what a socket calls its peer."""
    if not isinstance(peer, tuple):
        return "unix"
    return f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
