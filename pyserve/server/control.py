"""Where a running supervisor can be asked to upgrade: a socket for processes of its own user, and root's.

Its address is abstract, in the pid file, and chosen by the system. A request is a line of JSON, ``{"do": ...}``;
answers are reports as in `pyserve.launch`. A client that closes the connection takes the request back.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
from collections.abc import Callable

from pyserve.errors import JsonObject

CLIENTS_MAX = 8
REQUEST_SIZE_MAX = 1 << 16
_CREDENTIALS = struct.Struct("3i")


class ControlClient:
    """A connection of somebody who asks.

    Attributes:
        on_gone: called when it has hung up.
    """

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.on_gone: Callable[[], None] = lambda: None
        self.came = b""

    @property
    def is_gone(self) -> bool:
        """Whether it has hung up."""
        return self.sock.fileno() < 0

    def tell(self, event: str, **members: object) -> None:
        """Sends a report; one who does not read, or is gone, misses it."""
        with contextlib.suppress(OSError):
            self.sock.sendall(json.dumps({"event": event, **members}).encode() + b"\n")

    def close(self) -> None:
        self.sock.close()


class Control:
    """Main thread of the supervisor only.

    Args:
        sock: that of the program that this process was before; None for a new one.
    """

    def __init__(self, sock: socket.socket | None = None):
        if sock is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.bind("")  # the system chooses
            sock.listen(CLIENTS_MAX)
        sock.setblocking(False)
        self.sock = sock
        self._clients: list[ControlClient] = []
        self._selector: selectors.BaseSelector | None = None
        self._ask: Callable[[ControlClient, JsonObject], None] = lambda client, request: None

    @property
    def address(self) -> str:
        """As the pid file has it: ``@`` and the name."""
        return "@" + self.sock.getsockname()[1:].decode()

    def serve(self, selector: selectors.BaseSelector, ask: Callable[[ControlClient, JsonObject], None]) -> None:
        """From now on requests are given to ``ask``. What waits in ``selector`` is a function to be called."""
        self._selector, self._ask = selector, ask
        selector.register(self.sock.fileno(), selectors.EVENT_READ, self._accept)

    def adopt(self, sock: socket.socket) -> ControlClient:
        """The client that is being answered."""
        sock.setblocking(False)
        client = ControlClient(sock)
        self._clients.append(client)
        return client

    def drop(self, client: ControlClient) -> None:
        """After its last answer, or when it has hung up."""
        if client in self._clients:
            self._clients.remove(client)
            if self._selector is not None:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(client.sock.fileno())
            client.close()

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.sock.close()

    def _accept(self) -> None:
        assert self._selector is not None
        try:
            sock, _ = self.sock.accept()
        except OSError:
            return
        _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid not in (0, os.geteuid()) or len(self._clients) >= CLIENTS_MAX:
            sock.close()
            return
        client = self.adopt(sock)
        self._selector.register(sock.fileno(), selectors.EVENT_READ, lambda: self._read(client))

    def _read(self, client: ControlClient) -> None:
        try:
            chunk = client.sock.recv(REQUEST_SIZE_MAX)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        was_complete = b"\n" in client.came
        client.came += chunk
        if not chunk or len(client.came) > REQUEST_SIZE_MAX:
            client.on_gone()
            self.drop(client)
        elif b"\n" in client.came and not was_complete:
            try:
                request = json.loads(client.came.partition(b"\n")[0])
                if not isinstance(request, dict):
                    raise ValueError("no object")
            except (ValueError, RecursionError):
                request = {}
            self._ask(client, request)


def connect(address: str) -> socket.socket:
    """The other end.

    Raises:
        OSError: nobody is there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect("\0" + address.removeprefix("@"))
        _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid not in (0, os.geteuid()) and os.geteuid():
            raise PermissionError("another user's process has that address")
    except BaseException:
        sock.close()
        raise
    return sock
