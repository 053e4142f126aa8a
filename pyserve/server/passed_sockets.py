"""Listening sockets that a service manager has made and passes to us, see sd_listen_fds(3)."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable

from pyserve.config.address import Address
from pyserve.errors import ConfigError

FIRST_FD = 3
_NAMES = ("inference", "management", "metrics")


class PassedSockets:
    """Each once.

    Args:
        sockets: with the names that they were given; ``""`` or any other word for none.
    """

    def __init__(self, sockets: Iterable[tuple[str, socket.socket]] = ()):
        self._sockets = list(sockets)

    @classmethod
    def of_environment(cls) -> PassedSockets:
        """Those that this process was passed. The variables go, since children of ours are passed none.

        Raises:
            ConfigError: one is no socket that listens.
        """
        count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
        names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
        if not count.isdigit() or pid != str(os.getpid()):
            return cls()
        found = []
        for number in range(int(count)):
            fd = FIRST_FD + number
            try:
                sock = socket.socket(fileno=fd)
                is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            except OSError:
                is_listening = 0
            if not is_listening or sock.type != socket.SOCK_STREAM:
                raise ConfigError(f"descriptor {fd}, which the service manager has passed, is no stream socket that "
                                  "listens; its unit is to have ListenStream= and Accept=no")  # fmt: skip
            os.set_inheritable(fd, False)
            sock.setblocking(False)
            found.append((names[number] if number < len(names) else "", sock))
        return cls(found)

    def take(self, name: str, address: Address) -> tuple[socket.socket, Address] | None:
        """The socket for ``name``: that of this name, else one without a name of ours that has its address.

        Returns:
            With the address that it has, which may be another than the configured one; None if there is none.
        """
        unnamed = [(word, sock) for word, sock in self._sockets if word not in _NAMES]
        for word, sock in [each for each in self._sockets if each[0] == name] + unnamed:
            found = _address_of(sock, address)
            if word == name or (found.is_unix, found.host, found.port, found.path) == (
                address.is_unix, address.host, address.port, address.path
            ):  # fmt: skip
                self._sockets.remove((word, sock))
                return sock, found
        return None

    def check_all_taken(self, addresses: Iterable[Address]) -> None:
        """
        Raises:
            ConfigError: one was not; names it.
        """
        if self._sockets:
            word, sock = self._sockets[0]
            raise ConfigError(
                f"the service manager has passed a socket on {sock.getsockname()} ({word or 'without a name'}), which "
                f"is none of ours ({', '.join(map(str, addresses))}); name it with FileDescriptorName= inference, "
                "management or metrics"
            )


def _address_of(sock: socket.socket, configured: Address) -> Address:
    """Where it listens, in the scheme of ``configured``."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return Address.parse(f"unix:{name}", 0)
    scheme = "https" if configured.is_tls else "http"
    host = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
    return Address.parse(f"{scheme}://{host}:{name[1]}", 0)
