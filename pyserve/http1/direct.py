"""The rest of a large body goes from the socket straight to its place.

Reading it as an `asyncio.Protocol` does costs two copies more: into bytes for ``data_received``, and from there into
the body. So for as long as it takes, the connection's transport has another protocol, which shows it where to put the
bytes. It cannot read past the body, so that nothing has to be given back.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

from pyserve.http1.incoming import Incoming

# Bytes that are missing of a body; with fewer, changing the protocol costs more than it saves.
DIRECT_SIZE_MIN = 64 * 1024


class Owner(Protocol):
    """The connection's own protocol, as far as it is asked here."""

    def eof_received(self) -> bool: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None: ...

    def body_grew(self, incoming: Incoming) -> None: ...

    def body_came(self, incoming: Incoming) -> None: ...


class DirectBody(asyncio.BufferedProtocol):
    """Reads one body to its end, then gives the transport back to ``owner``. Loop thread only.

    ``owner.body_came`` is called in the next turn of the loop, when the transport has let go of the body's memory:
    until then nobody could change its size. Nothing is read meanwhile.
    """

    def __init__(self, owner: Owner, transport: asyncio.Transport, incoming: Incoming, loop: asyncio.AbstractEventLoop):
        self._owner = owner
        self._transport = transport
        self._incoming = incoming
        self._loop = loop
        self._place = memoryview(b"")  # none until something comes: what is announced may never come
        if transport.is_closing():
            return  # nothing is read any more
        incoming.on_release = self.stop
        transport.pause_reading()  # transports look at their protocol's kind when they begin to read
        transport.set_protocol(self)
        transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        if not self._place:
            self._place = memoryview(b"")  # the body can grow only while nobody has a view of it
            self._place = self._incoming.place()
        return self._place

    def buffer_updated(self, nbytes: int) -> None:
        incoming = self._incoming
        incoming.took(nbytes)
        self._place = self._place[nbytes:]
        if incoming.body.complete:
            incoming.on_release = None
            self._give_back()
            self._loop.call_soon(self._owner.body_came, incoming)
        elif incoming.refusal is not None:
            self.stop()
            self._owner.body_grew(incoming)
        else:
            self._owner.body_grew(incoming)

    def stop(self) -> None:
        """Gives the transport back before the body's end; what still comes of it is not taken."""
        self._incoming.on_release = None
        if not self._transport.is_closing():
            self._give_back()
            self._transport.resume_reading()

    def _give_back(self) -> None:
        self._place = memoryview(b"")
        self._transport.pause_reading()
        self._transport.set_protocol(cast(asyncio.BaseProtocol, self._owner))

    # all else is the owner's

    def eof_received(self) -> bool:
        return self._owner.eof_received()

    def pause_writing(self) -> None:
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        self._owner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.connection_lost(exc)
        # The transport keeps this object's methods for good.
        del self._owner, self._transport, self._incoming, self._place
