"""The engine's side of one front end: its requests become exchanges, and their answers go back to it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from pyserve._front import HEAD_SIZE_MAX
from pyserve.errors import ServerError
from pyserve.fronts import wire
from pyserve.fronts.channel import Body, Channel, RubbishError
from pyserve.fronts.shares import Shares
from pyserve.http1.answer import INTERNAL_ERROR
from pyserve.log import about
from pyserve.request.body_budget import BodyBudget
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat, Request, Response

log = logging.getLogger(__name__)

App = Callable[[Exchange], None]
STATUS_MAX = 599


class CarriedExchange(Exchange):
    """An exchange whose connection is in a front end.

    Attributes:
        ticket: its number there.
        size: bytes of its body, until it is answered.
    """

    __slots__ = ("size", "ticket")

    def __init__(
        self, request: Request, deliver: Callable[[Exchange], None], protocol_bytes: int, ticket: int, size: int
    ):
        super().__init__(request, deliver, protocol_bytes=protocol_bytes)
        self.ticket = ticket
        self.size = size


class Link:
    """One front end, from its connection to the engine until one of them goes. Loop thread only.

    Args:
        number: of the front end.
        apps: answer the requests of the listeners, by their numbers.
        budget: of the bytes that bodies grow by here.
        shares: what a front end may have in flight.
        refused: answers that front ends gave themselves, counted by status; added to.
        on_change: called when it says something of itself, or has no more requests.

    Attributes:
        channel: set by whoever makes the link, before anything comes.
        is_listening: its clients are let in.
        is_drained: it has answered all of them, and has let go of its sockets.
        connection_count: its open connections, as it last said.
        request_count: requests that came through it.
    """

    channel: Channel

    def __init__(  # noqa: PLR0917 - made once
        self, number: int, apps: Sequence[App], budget: BodyBudget, shares: Shares, refused: Counter[int],
        error_format: ErrorFormat, on_change: Callable[[], None],
    ):  # fmt: skip
        self.number = number
        self.is_listening = self.is_drained = False
        self.connection_count = self.request_count = 0
        self._apps = apps
        self._budget = budget
        self._shares = shares
        self._refused = refused
        self._error_format = error_format
        self._on_change = on_change
        self._requests = wire.RequestReader(len(apps))
        self._live: dict[int, CarriedExchange] = {}
        self._size = 0  # of bodies in flight

    @property
    def in_flight(self) -> int:
        """Requests that are not answered in full."""
        return len(self._live)

    def take(self, kind: int, flags: int, ticket: int, head: bytes, body: bytes | bytearray) -> None:
        """A message of the front end.

        Raises:
            RubbishError: no front end sends that.
        """
        if kind == wire.REQUEST:
            assert isinstance(body, bytearray)
            self._take_request(ticket, head, body)
        elif kind == wire.CANCEL:
            exchange = self._live.pop(ticket, None)
            if exchange is not None:
                self._release(exchange)
                exchange.disconnect()
                self._changed()
        elif kind == wire.REFUSED:
            if not 200 <= flags <= STATUS_MAX:
                raise RubbishError("a count of answers with a status that there is not")
            self._refused[flags] += ticket
        elif kind == wire.CONNECTIONS:
            self.connection_count = min(ticket, self._shares.connection_count_max * len(self._apps))
        elif kind in (wire.LISTENING, wire.DRAINED):
            self.is_listening = kind == wire.LISTENING
            self.is_drained = kind == wire.DRAINED
            self._on_change()
        else:
            raise RubbishError("a message of a kind that front ends do not send")

    def lose(self) -> None:
        """The front end has gone, and its clients with it."""
        exchanges = list(self._live.values())
        self._live.clear()
        for exchange in exchanges:
            self._release(exchange)
            exchange.disconnect()

    def _take_request(self, ticket: int, head: bytes, body: bytearray) -> None:
        size = len(body)
        if ticket in self._live:
            raise RubbishError("two requests with one number")
        if self._size + size > self._shares.body_budget_size or len(self._live) >= self._shares.in_flight_max:
            raise RubbishError("more requests at once than a front end lets in")
        request, listener, wire_size, is_http11 = self._requests.read(head, body, time.monotonic_ns())
        exchange = CarriedExchange(request, self._deliver, wire_size, ticket, size)
        exchange.is_http11 = is_http11
        self._size += size
        self._live[ticket] = exchange
        self.request_count += 1
        try:
            self._apps[listener](exchange)
        except Exception:
            self._fail(exchange)

    def _release(self, exchange: CarriedExchange) -> None:
        self._size -= exchange.size
        exchange.size = 0
        if exchange.reserved:
            self._budget.release(exchange.reserved)
            exchange.reserved = 0

    def _fail(self, exchange: Exchange) -> None:
        request = exchange.request
        log.exception("request %s %s %s failed", request.id, request.method, request.path,
                      extra=about(request_id=request.id))  # fmt: skip
        exchange.respond(self._error_format.answer(ServerError(INTERNAL_ERROR), request))

    # the way back

    def _deliver(self, exchange: Exchange) -> None:
        assert isinstance(exchange, CarriedExchange)
        if exchange.size or exchange.reserved:
            self._release(exchange)
        response = exchange.response
        exchange.response = None
        if exchange.is_streaming:
            self._deliver_parts(exchange, response)
        elif response is not None:
            self._live.pop(exchange.ticket, None)
            self._answer(exchange, response)
            self._changed()
        if self.channel.waiting_size > self._shares.waiting_size_max:
            self.channel.give_up("it does not read its answers")

    def _answer(self, exchange: CarriedExchange, response: Response) -> None:
        try:
            parts = _bytes_of(response)
            status = _status_of(response)
            head = _head_of(response)
        except Exception:
            request = exchange.request
            log.exception("answer to request %s %s %s cannot be sent", request.id, request.method, request.path,
                          extra=about(request_id=request.id))  # fmt: skip
            response = self._error_format.answer(ServerError(INTERNAL_ERROR), request)
            parts, status, head = [response.body], response.status, wire.answer_head(response)
        if len(parts) == 1:
            self.channel.send(wire.ANSWER, status, exchange.ticket, head, parts[0])
        else:
            self.channel.send_parts(wire.ANSWER, status, exchange.ticket, head, parts)

    def _deliver_parts(self, exchange: CarriedExchange, head: Response | None) -> None:
        send, ticket = self.channel.send, exchange.ticket
        if head is not None:
            try:
                send(wire.STREAM, _status_of(head), ticket, _head_of(head))
            except Exception:
                log.exception("answer to request %s cannot be sent", exchange.request.id,
                              extra=about(request_id=exchange.request.id))  # fmt: skip
                exchange.is_ended = exchange.is_aborted = True
        for part in exchange.parts:
            send(wire.PART, 0, ticket, b"", memoryview(part).cast("B"))
        exchange.parts.clear()
        exchange.parts_size = 0
        if exchange.is_ended:
            self._live.pop(ticket, None)
            send(wire.ABORT if exchange.is_aborted else wire.END, 0, ticket)
            self._changed()

    def _changed(self) -> None:
        if not self._live:
            self._on_change()


def _head_of(response: Response) -> bytes:
    head = wire.answer_head(response)
    if len(head) > HEAD_SIZE_MAX:
        raise ValueError(f"the headers of an answer are larger than {HEAD_SIZE_MAX} bytes")
    return head


def _bytes_of(response: Response) -> list[Body]:
    body = response.body
    if type(body) is not bytes:
        view = memoryview(body)
        body = view.cast("B") if view.nbytes else b""
    return [body, *response.tail] if response.tail else [body]


def _status_of(response: Response) -> int:
    """0, which no protocol sends, for one that does not exist; the front end will say so."""
    status = response.status
    return int(status) if isinstance(status, int) and 0 <= status <= STATUS_MAX else 0
