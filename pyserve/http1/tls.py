"""HTTP/1.1 over TLS: what differs is how a connection ends.

Closing means to send an alert and to wait for the peer's, which a client that keeps an idle connection sends when it
next looks at it, hours later maybe. So we wait until everything is on its way to the client, and then hang up.
"""

from __future__ import annotations

import array
import fcntl
import termios

from pyserve.http1.protocol import Http1Protocol

HANG_UP_S = 0.1


class Http1TlsProtocol(Http1Protocol):
    """One connection whose transport speaks TLS. Loop thread only."""

    def eof_received(self) -> bool:
        super().eof_received()
        # TLS connections are never half closed: the transport takes nothing more.
        self._abandon()
        self._close()
        return False

    def _end_output(self) -> None:
        self._transport.close()  # sends the alert; what the client still sends is read and thrown away

    def _close(self) -> None:
        super()._close()
        self._timer.set(self._loop.time() + HANG_UP_S)

    def _on_deadline(self) -> None:
        if not self._transport.is_closing():
            super()._on_deadline()
        elif self._transport.get_write_buffer_size() or self._unsent_size():
            self._timer.set(self._loop.time() + HANG_UP_S)  # how slow it may be is the stall timer's business
        else:
            self._transport.abort()

    def _unsent_size(self) -> int:
        """Bytes that the client has not confirmed yet. While there are none, the transport has none for it either."""
        sock = self._transport.get_extra_info("socket")
        count = array.array("i", [0])
        if sock is not None:
            fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
        return count[0]
