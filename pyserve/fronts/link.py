"""The engine's side of one front end: its requests become exchanges, and their answers go back to it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pyserve._front import HEAD_SIZE_MAX
from pyserve.errors import ServerError
from pyserve.fronts import wire
from pyserve.fronts.channel import RING_SIZE, Body, Channel, RubbishError
from pyserve.fronts.rows import TEXT_SIZE_MAX
from pyserve.fronts.shares import Shares
from pyserve.http1.answer import INTERNAL_ERROR
from pyserve.log import about
from pyserve.request.body_budget import BodyBudget
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat, Request, Response

if TYPE_CHECKING:
    from pyserve import _core

log = logging.getLogger(__name__)

App = Callable[[Exchange], None]
STATUS_MAX = 599
_READS_NOTHING = "it does not read its answers"


def _ignore(told: wire.ToldTimes) -> None:
    """Nothing came as a tensor."""


class CarriedExchange(Exchange):
    """An exchange whose connection is in a front end.

    Attributes:
        ticket: its number there.
        size: bytes of its body, until it is answered.
    """

    __slots__ = ("kept", "size", "ticket")

    def __init__(
        self, request: Request, deliver: Callable[[Exchange], None], protocol_bytes: int, ticket: int, size: int
    ):
        super().__init__(request, deliver, protocol_bytes=protocol_bytes)
        self.kept: Any = None
        self.ticket = ticket
        self.size = size


class AdoptedExchange(CarriedExchange):
    """One of a request that came as a tensor, and that the engine could not answer by itself.

    Its endpoint has to, with the output of its model if that has run. To parse it, it needs it as its client has sent
    it, so it comes again.
    """

    __slots__ = ("give_back",)
    keeps_output = True

    def __init__(
        self, request: Request, deliver: Callable[[Exchange], None], protocol_bytes: int, ticket: int,
        give_back: Callable[[AdoptedExchange], None],
    ):  # fmt: skip
        super().__init__(request, deliver, protocol_bytes, ticket, 0)
        self.give_back = give_back

    def keep(self, output: Any) -> None:
        """Its model has run."""
        self.kept = output
        self.give_back(self)


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
        rows: the engine's part of it, which takes what comes as tensors; None if nothing does.
        is_listening: its clients are let in.
        is_drained: it has answered all of them, and has let go of its sockets.
        connection_count: its open connections, as it last said.
        on_times: told what the front end did for requests of models.
        native_count: requests that it has read natively, as it last said.
        keeping_count: looks in a row that found it with more of the budget than `size` explains.
    """

    channel: Channel
    rows: _core.FrontRows | None = None

    def __init__(  # noqa: PLR0917 - made once
        self, number: int, apps: Sequence[App], budget: BodyBudget, shares: Shares, refused: Counter[int],
        error_format: ErrorFormat, on_change: Callable[[], None],
    ):  # fmt: skip
        self.number = number
        self.is_listening = self.is_drained = False
        self.connection_count = self._request_count = self.keeping_count = self.native_count = 0
        self.on_times: Callable[[wire.ToldTimes], object] = _ignore
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
        return len(self._live) + (0 if self.rows is None else self.rows.count)

    @property
    def size(self) -> int:
        """Bytes of bodies that it may have in flight, by what came of them; of tensors, which were longer as text, the
        most that they can have been of."""  # fmt: skip
        crossed = 0 if self.rows is None else self.rows.count * TEXT_SIZE_MAX + self.rows.size
        return self._size + crossed + 2 * RING_SIZE

    @property
    def request_count(self) -> int:
        """Requests that came through it."""
        return self._request_count + self.tensor_count

    @property
    def tensor_count(self) -> int:
        """Those of them that came as tensors."""
        return 0 if self.rows is None else self.rows.request_count

    def take(self, kind: int, flags: int, ticket: int, head: bytes, body: bytes | bytearray) -> None:
        """A message of the front end.

        Raises:
            RubbishError: no front end sends that.
        """
        if kind == wire.REQUEST:
            assert isinstance(body, bytearray)
            self._take_request(ticket, head, body)
        elif kind == wire.CANCEL:
            self._cancel(ticket)
        elif kind == wire.TIMES:
            self.on_times(wire.ToldTimes.read(body))
        elif kind == wire.REFUSED:
            if not 200 <= flags <= STATUS_MAX:
                raise RubbishError("a count of answers with a status that there is not")
            self._refused[flags] += ticket
        elif kind == wire.CONNECTIONS:
            self.connection_count = min(ticket, self._shares.connection_count_max * len(self._apps))
        elif kind == wire.NATIVE:
            self.native_count = min(ticket, self.tensor_count)
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
        if self.rows is not None:
            for lane, url_version in self.rows.close():
                if lane is not None:
                    lane.row_cancelled(url_version)

    def _cancel(self, ticket: int) -> None:
        exchange = self._live.pop(ticket, None)
        if exchange is not None:
            self._release(exchange)
            exchange.disconnect()
            self._changed()
        elif self.rows is not None:
            found = self.rows.cancel(ticket)
            if found is not None and found[0] is not None:
                found[0].row_cancelled(found[1])
            self._changed()

    def send_table(self, table: bytes) -> None:
        """Has it know what may come as tensors."""
        self.channel.send(wire.TABLE, 0, 0, b"", table)

    # what the engine could not do by itself; it calls these

    def send_row(self, ticket: int, head: bytes, body: bytes) -> None:
        """An answer for which there is no room now."""
        self.channel.send(wire.ROW_ANSWER, 200, ticket, head, body)
        if self.channel.waiting_size > self._shares.waiting_size_max:
            self.channel.give_up(_READS_NOTHING)

    def send_again(self, ticket: int, *, has_run: bool = False) -> None:
        """A request has to come again, as it was; ``has_run``: its model has run for it."""
        self.channel.send(wire.AGAIN, has_run, ticket)

    def adopt(self, ticket: int, head: bytes) -> AdoptedExchange | None:
        """A request that came as a tensor, to be answered from here on; None if it cannot be read."""
        try:
            request, _, wire_size, is_http11 = self._requests.read(head, bytearray(), time.monotonic_ns())
            if request.has_timing or ticket in self._live:
                raise RubbishError("a tensor that no front end sends")
        except RubbishError as error:
            self.channel.give_up(str(error))
            return None
        exchange = AdoptedExchange(request, self._deliver, wire_size, ticket, self._give_back)
        exchange.is_http11 = is_http11
        self._live[ticket] = exchange
        return exchange

    def _give_back(self, exchange: AdoptedExchange) -> None:
        self.send_again(exchange.ticket, has_run=True)

    # requests

    def _take_request(self, ticket: int, head: bytes, body: bytearray) -> None:
        size = len(body)
        adopted = self._live.get(ticket)
        kept = None if adopted is None or not adopted.keeps_output else adopted.kept
        if kept is not None:
            del self._live[ticket]  # it is the same, come again
        elif adopted is not None:
            raise RubbishError("two requests with one number")
        if self._size + size > self._shares.body_budget_size or self.in_flight >= self._shares.in_flight_max:
            raise RubbishError("more requests at once than a front end lets in")
        request, listener, wire_size, is_http11 = self._requests.read(head, body, time.monotonic_ns())
        exchange = CarriedExchange(request, self._deliver, wire_size, ticket, size)
        exchange.is_http11 = is_http11
        exchange.kept = kept
        self._size += size
        self._live[ticket] = exchange
        self._request_count += kept is None
        try:
            self._apps[listener](exchange)
        except Exception:
            self._fail(exchange)
        if kept is not None:
            kept.let_go()

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
            self.channel.give_up(_READS_NOTHING)

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
        if not self.in_flight:
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
