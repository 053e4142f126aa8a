"""Where front ends and the engine process find each other, again after one of them was started anew.

The supervisor makes one listening socket and a secret, and hands both to all of its processes. A front end connects
and shows the secret; the engine answers with the link's memory. While there is no engine the connection waits in the
backlog, so neither has to know whether the other is there.
"""

from __future__ import annotations

import os
import secrets
import socket
from typing import NamedTuple

from pyserve.errors import JsonObject

BACKLOG = 256
SECRET_SIZE = 32


class Meeting(NamedTuple):
    """The place.

    Attributes:
        sock: listening; of abstract address, so that it needs no file and is gone with its last process.
        secret: 32 bytes that tell a front end from any other process of this machine.
    """

    sock: socket.socket
    secret: bytes

    @classmethod
    def make(cls) -> Meeting:
        """A new one."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.bind("")  # the system chooses
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return cls(sock, secrets.token_bytes(SECRET_SIZE))

    def for_engine(self) -> JsonObject:
        """For a process that inherits ``sock``."""
        return {"fd": self.sock.fileno(), "secret": self.secret.hex()}

    def for_front_end(self, number: int) -> JsonObject:
        """For the front end of this number."""
        return {"address": self.sock.getsockname().hex(), "secret": self.secret.hex(), "number": number}

    @classmethod
    def of_engine(cls, handed: JsonObject) -> Meeting:
        """The inverse of `for_engine`, in that process."""
        os.set_inheritable(handed["fd"], False)
        return cls(socket.socket(fileno=handed["fd"]), bytes.fromhex(handed["secret"]))


class Way(NamedTuple):
    """A front end's way to the engine.

    Attributes:
        address: of the `Meeting`.
        secret: the meeting's.
        number: which front end it is.
    """

    address: bytes
    secret: bytes
    number: int

    @classmethod
    def of(cls, handed: JsonObject) -> Way:
        """The inverse of `Meeting.for_front_end`."""
        return cls(bytes.fromhex(handed["address"]), bytes.fromhex(handed["secret"]), handed["number"])

    def connect(self) -> socket.socket:
        """A connection, which the engine answers when there is one.

        Raises:
            OSError: there is no room for one more.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.setblocking(False)
            sock.connect(self.address)
        except BaseException:
            sock.close()
            raise
        return sock
