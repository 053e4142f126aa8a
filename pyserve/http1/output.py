"""The writing half of a connection: answers leave in the order of their requests, whole ones and those in parts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import cast

from pyserve.http1.connections import Connections
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Response

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Output:
    """What one connection has to write. Loop thread only.

    Args:
        connections: the listener's register of connections.
        has_input: whether more has been received than the requests that were taken; asked while the listener goes away.

    Attributes:
        transport: the connection's; set before anything is answered.
        slots: the requests that are not answered in full, in the order in which they came.
        is_writable: whether the transport takes more for now.
    """

    __slots__ = ("_connections", "_has_input", "is_writable", "slots", "transport")

    def __init__(self, connections: Connections, has_input: Callable[[], bool]):
        self._connections = connections
        self._has_input = has_input
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.slots: deque[Exchange] = deque()
        self.is_writable = True

    def close(self) -> None:
        """Nothing is written any more."""
        self.slots.clear()
        self._has_input = bool  # False; what was here holds the connection that holds this

    def flush(self) -> bool:
        """Writes the answers at the front of the queue, as far as they are there.

        Returns whether the connection is kept: False after an answer that is its last.
        """
        slots, connections = self.slots, self._connections
        while slots and self.is_writable:
            exchange = slots[0]
            response = exchange.response
            keep_alive = exchange.keep_alive
            if exchange.is_streaming:
                if not self._write_parts(exchange, response):
                    break
                slots.popleft()
                keep_alive = exchange.keep_alive and not self._ends_here(len(slots))
            elif response is None:
                break
            else:
                slots.popleft()
                if keep_alive and connections.parting:
                    keep_alive = not self._ends_here(len(slots))
                exchange.response = None
                connections.on_answer(exchange.request, response.status, exchange.is_http11)
                head, parts = connections.answers.encode(response, exchange.request, keep_alive)
                self.transport.write(head)
                if parts:
                    self.transport.writelines(parts)
            if not keep_alive:
                return False
        return True

    def _ends_here(self, behind: int) -> bool:
        """Whether an answer is the last one, as the listener goes away and no request is ``behind`` it."""
        return self._connections.parting and not (behind or self._has_input())

    def _write_parts(self, exchange: Exchange, head: Response | None) -> bool:
        """Writes what there is of a streamed answer; returns whether it is complete."""
        is_chunked = exchange.is_http11
        if head is not None:
            exchange.response = None
            self._connections.on_answer(exchange.request, head.status, is_chunked)
            if not is_chunked or self._ends_here(len(self.slots) - 1):
                exchange.keep_alive = False  # the end of the connection is the end of the answer
            written = self._connections.answers.stream_head(head, exchange.request, exchange.keep_alive, is_chunked)
            if written is None:
                exchange.is_aborted = True
            else:
                self.transport.write(written)
        if exchange.is_aborted:
            self.transport.abort()
            return False
        is_wanted = exchange.request.method != "HEAD"
        while exchange.parts and self.is_writable:
            part = exchange.take_part(is_chunked)
            if is_wanted:
                self.transport.write(part)
        if exchange.parts or not exchange.is_ended:
            return False
        if is_chunked and is_wanted:
            self.transport.write(b"0\r\n\r\n")
        return True

    def write_continue(self) -> None:
        """The interim answer to a client that waits for it before it sends a body."""
        self.transport.write(_CONTINUE)

    def probe(self) -> None:
        """Sends something that changes nothing, if there is such a thing now: it shows a client that has gone."""
        exchange = self.slots[0]
        if exchange.is_http11 and exchange.response is None and not exchange.is_streaming:
            self.write_continue()
