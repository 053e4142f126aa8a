"""A front end's side of the link: requests go to the engine, answers come back; without an engine it says so itself."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic, monotonic_ns

from pyserve._front import LEDGER_PAGE_SIZE, Ledger
from pyserve.errors import OverloadedError, ServeError
from pyserve.fronts import wire
from pyserve.fronts.channel import Channel, LinkFiles, RubbishError
from pyserve.fronts.fast_door import IS_BUILT, FastDoor
from pyserve.fronts.meeting import Way
from pyserve.fronts.outputs import AS_BYTES, Output, Row
from pyserve.fronts.rows import Table
from pyserve.fronts.shared_budget import LOOK_S, SharedBudget
from pyserve.fronts.shares import Shares
from pyserve.http1.connections import Connections
from pyserve.http1.fast_protocol import FastProtocol
from pyserve.request.deadline import client_deadline
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat, Request

log = logging.getLogger(__name__)

# Between two tries to reach the engine, when the last link did not last.
PAUSE_FIRST_S = 0.05
PAUSE_MAX_S = 2.0
_LASTING_S = 5.0
# How often counts are told to the engine, and a look is taken at what others want of the budget.
TELLING_S = LOOK_S
# How long requests wait for the process that takes a healthy engine's place.
HOLDING_S = 60.0


class Door:
    """Loop thread only.

    Args:
        on_open: the engine answers: clients may be let in. Called with each new link.
        on_parting: each answer is to be its connection's last.
        on_close: nobody is to be accepted any more: another process does that.
        on_drain: nobody is to be let in any more; `tell_drained` is called after the last answer.
        answer_size_max: bytes of an answer that is made here (``max_response_size``).
        bodies: the budget of bodies, which is told of the others; None if there is none to tell.

    Attributes:
        connections: those of the listeners, whose counts the engine is told.
        row_listeners: numbers of those whose requests may cross as tensors.
        fast: what reads and answers some of them natively; None if nothing does.
    """

    def __init__(
        self, way: Way, shares: Shares, error_format: ErrorFormat, *, on_open: Callable[[], None],
        on_parting: Callable[[], None], on_close: Callable[[], None], on_drain: Callable[[], None],
        answer_size_max: int = 0, bodies: SharedBudget | None = None,
    ):  # fmt: skip
        self.connections: Sequence[Connections] = ()
        self.row_listeners: frozenset[int] = frozenset()
        self.fast = FastDoor(self) if IS_BUILT else None
        self._answer_size_max = answer_size_max
        self._bodies = bodies
        self._table = Table()
        self._former_tables: list[Table] = []  # under which requests went that are not over
        self._rows: dict[int, tuple[int, Row]] = {}  # of those pending: listener, and what makes the answer
        self._loop = asyncio.get_running_loop()
        self._way = way
        self._shares = shares
        self._error_format = error_format
        self._on = {wire.OPEN: on_open, wire.PARTING: on_parting, wire.CLOSE: on_close, wire.DRAIN: on_drain}
        self._requests = wire.RequestWriter()
        self._channel: Channel | None = None
        self._is_open = False
        self._ticket = 0
        self._pending: dict[int, Exchange] = {}
        self._told_refused: list[Counter[int]] = []
        self._told_count = self._told_native = -1
        self._native_before = 0  # of former links
        self._pause_s = PAUSE_FIRST_S
        self._linked_at = 0.0
        self._telling: asyncio.TimerHandle | None = None
        # Until another engine is there: with their listeners, and what fires when their clients stop waiting.
        self._held: dict[Exchange, tuple[int, asyncio.TimerHandle | None]] = {}
        self._holding: asyncio.TimerHandle | None = None  # while an engine makes room for another
        self._connecting: asyncio.TimerHandle | None = None
        self._greeting: socket.socket | None = None  # a connection that the engine has not answered yet

    def app(self, listener: int) -> Callable[[Exchange], None]:
        """What has the engine answer the requests of the listener of this number."""
        return partial(self._submit, listener)

    def start(self) -> None:
        """Looks for the engine, from now on."""
        self._connect()

    def tell_listening(self) -> None:
        """Clients are let in."""
        if self._channel is not None:
            self._channel.send(wire.LISTENING, 0, 0)

    def tell_drained(self) -> None:
        """All were answered."""
        if self._channel is not None:
            self._tell_counts()
        if self._channel is not None:
            self._channel.send(wire.DRAINED, 0, 0)

    def stop(self) -> None:
        """Lets go of the engine, and looks for no other."""
        for timer in (self._telling, self._connecting, self._holding):
            if timer is not None:
                timer.cancel()
        if self._greeting is not None:
            self._loop.remove_reader(self._greeting.fileno())
            self._greeting.close()
        if self.fast is not None:
            self.fast.close()
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    # requests

    def _submit(self, listener: int, exchange: Exchange) -> None:
        channel = self._channel
        if channel is None or not self._is_open:
            if self._holding is None:
                raise _engine_away()
            self._hold(exchange, listener)
            return
        row = self._table.row_of(exchange.request) if listener in self.row_listeners else None
        if row is None:
            self._send(channel, listener, exchange)
            return
        head = self._requests.row_head(exchange, listener, self._table.generation, row.route)
        ticket = self._enter(exchange)
        self._rows[ticket] = listener, row
        channel.send_whole(wire.ROW, row.form, ticket, head, row.item)

    def _enter(self, exchange: Exchange, ticket: int = 0) -> int:
        if not ticket:
            self._ticket = ticket = self._ticket + 1
        self._pending[ticket] = exchange
        exchange.on_disconnect = partial(self._cancel, ticket)
        return ticket

    def _send(self, channel: Channel, listener: int, exchange: Exchange, ticket: int = 0) -> None:
        """A request as it is; under the number that it has already, if it has one."""
        request = exchange.request
        if request.path.startswith("/metrics"):
            self._tell_counts()
        head = self._requests.head(exchange, listener)
        channel.send(wire.REQUEST, 0, self._enter(exchange, ticket), head, request.body)
        request.body = bytearray()  # it is the engine's now

    def _end_row_without_answer(self, ticket: int) -> None:
        """A request is over. If it crossed as a tensor, that its body was decoded counts, though nothing is encoded."""
        told = self._rows.pop(ticket, None)
        if told is not None and told[1].times is not None:
            told[1].times.note_decoded(told[1].decoding_s)

    def _cancel(self, ticket: int) -> None:
        self._end_row_without_answer(ticket)
        if self._pending.pop(ticket, None) is not None and self._channel is not None:
            self._channel.take_back(ticket)
            self._channel.send(wire.CANCEL, 0, ticket)

    def send_cancel(self, ticket: int) -> None:
        """The client of a request has gone that native code has sent."""
        if self._channel is not None:
            self._channel.send(wire.CANCEL, 0, ticket)

    def take_over_call(self, call: tuple[FastProtocol, int, bytes, str, int, Callable[[Request], Row | None]]) -> None:
        """A request that native code has sent as a tensor is as one that was sent from here.

        Args:
            call: its connection, its ticket, the request as it came, its id, the number of its listener, and who makes
                the tensor of it that it was sent as.
        """
        protocol, ticket, data, id, listener, row_of = call
        exchange = protocol.adopt(0, data, id)
        self._rows[ticket] = listener, row_of(exchange.request) or _UNKNOWN
        self._enter(exchange, ticket)

    def _set_fast(self) -> None:
        """Has native code take what the engine takes now."""
        if self.fast is not None:
            self.fast.set(self._table if self._is_open else None)

    def _take(self, kind: int, flags: int, ticket: int, head: bytes, body: bytes | bytearray) -> None:
        if kind == wire.ROW_ANSWER:
            self._take_row(ticket, head, bytes(body))
        elif kind == wire.ANSWER:
            exchange = self._pending.pop(ticket, None)
            if self._rows:
                self._end_row_without_answer(ticket)
            if exchange is not None:  # else its client has gone
                exchange.respond(wire.read_answer(flags, head, bytes(body)))
        elif kind == wire.AGAIN:
            self._send_again(ticket, has_run=flags != 0)
        elif kind == wire.TABLE:
            self._take_table(Table(bytes(body), self._answer_size_max))
            self._set_fast()
        elif wire.STREAM <= kind <= wire.ABORT:
            self._take_part(kind, flags, ticket, head, bytes(body))
        elif kind == wire.PAUSE:
            self._is_open = False
            self._set_fast()
            if self._holding is None:
                self._holding = self._loop.call_later(HOLDING_S, self._give_up_holding)
        elif kind in self._on:
            self._on[kind]()
            if kind == wire.OPEN:
                self._is_open = True
                self._set_fast()
                self._pass_held()
        else:
            raise RubbishError("a message of a kind that the engine does not send")

    def _take_table(self, table: Table) -> None:
        """From now on requests go under ``table``. What is done for those on their way counts under theirs."""
        self._tell_times()
        used = {id(row.times) for _, row in self._rows.values()}
        if self.fast is not None:
            used.update(map(id, self.fast.used_times()))
        self._former_tables = [each for each in (*self._former_tables, self._table) if each.has_times_of(used)]
        self._table = table

    def _take_row(self, ticket: int, head: bytes, row: bytes) -> None:
        """The output's row for a request that crossed as a tensor."""
        told = self._rows.get(ticket)
        if told is None:
            return  # its client has gone
        known = told[1]
        began = 0.0 if known.times is None else monotonic()
        answer = known.encode(self._table.output(head), row)
        if answer is None:
            self._send_again(ticket)
            return
        if known.times is not None:
            known.times.note_decoded(known.decoding_s)
            known.times.note_encoded(monotonic() - began)
        del self._rows[ticket]
        self._pending.pop(ticket).respond(answer)

    def _send_again(self, ticket: int, *, has_run: bool = False) -> None:
        """A request that crossed as a tensor goes as it is, under the same number; its model may have run on that."""
        told = self._rows.pop(ticket, None)
        exchange = self._pending.pop(ticket, None)
        if told is not None and exchange is not None and self._channel is not None:
            if has_run and told[1].times is not None:
                told[1].times.note_decoded(told[1].decoding_s)
            self._send(self._channel, told[0], exchange, ticket)

    def _take_part(self, kind: int, flags: int, ticket: int, head: bytes, body: bytes) -> None:
        exchange = self._pending.get(ticket)
        if exchange is None:
            return
        if kind == wire.STREAM:
            exchange.start_stream(wire.read_answer(flags, head, body))
        elif kind == wire.PART:
            exchange.write(body)
        else:
            del self._pending[ticket]
            exchange.end_stream() if kind == wire.END else exchange.abort_stream()

    # requests that wait for another engine

    def _pass_held(self) -> None:
        held = self._stop_holding()
        for exchange, listener in held.items():
            try:
                self._submit(listener, exchange)
            except ServeError as error:
                exchange.respond(self._error_format.answer(error, exchange.request))

    def _hold(self, exchange: Exchange, listener: int) -> None:
        limit_s = _remaining_s(exchange.request) if exchange.request.has_timing else None
        timer = None if limit_s is None else self._loop.call_later(limit_s, self._give_up, exchange)
        self._held[exchange] = listener, timer
        exchange.on_disconnect = partial(self._let_go, exchange)

    def _let_go(self, exchange: Exchange) -> None:
        _, timer = self._held.pop(exchange, (0, None))
        if timer is not None:
            timer.cancel()

    def _give_up(self, exchange: Exchange) -> None:
        self._let_go(exchange)
        exchange.respond(self._error_format.answer(_engine_away(), exchange.request))

    def _give_up_holding(self) -> None:
        for exchange in self._stop_holding():
            exchange.respond(self._error_format.answer(_engine_away(), exchange.request))

    def _stop_holding(self) -> dict[Exchange, int]:
        if self._holding is not None:
            self._holding.cancel()
            self._holding = None
        held = {exchange: listener for exchange, (listener, _) in self._held.items()}
        for exchange in held:
            self._let_go(exchange)
        return held

    # the link

    def _connect(self) -> None:
        try:
            sock = self._way.connect()
            sock.send(wire.HELLO.pack(wire.MAGIC, wire.VERSION, self._way.number, self._way.secret))
        except OSError as error:
            log.warning("the engine cannot be reached: %s", error.strerror)
            self._connect_later()
            return
        self._greeting = sock
        self._loop.add_reader(sock.fileno(), self._welcome, sock)

    def _connect_later(self) -> None:
        if self._loop.time() - self._linked_at > _LASTING_S:
            self._pause_s = PAUSE_FIRST_S
        self._connecting = self._loop.call_later(self._pause_s, self._connect)
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)

    def _welcome(self, sock: socket.socket) -> None:
        self._loop.remove_reader(sock.fileno())
        self._greeting = None
        files: list[int] = []
        try:
            said, files, _, _ = socket.recv_fds(sock, len(wire.MAGIC), wire.FILE_COUNT)
            if said != wire.MAGIC or len(files) != wire.FILE_COUNT:
                raise OSError("it ended before it had begun")
            for fd in files:
                os.set_inheritable(fd, False)
            self._attach(files[-1])
            os.close(files.pop())
            self._channel = Channel(
                self._loop, sock, LinkFiles(*files), is_engine=False, body_size_max=self._shares.answer_size_max,
                coming_size_max=2 * self._shares.answer_size_max, on_frame=self._take, on_end=self._lose,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            for fd in files:
                os.close(fd)
            sock.close()
            log.info("no link to the engine yet: %s", error)
            self._connect_later()
            return
        if self.fast is not None:
            self.fast.attach(self._channel)
        self._linked_at = self._loop.time()
        self._told_count = self._told_native = -1
        if self._telling is None:
            self._tell_again()

    def _attach(self, fd: int) -> None:
        """The ledger of a new link."""
        if self._bodies is not None:
            size_max, number = self._bodies.size_max, self._way.number
            self._bodies.attach(Ledger(fd, os.fstat(fd).st_size // LEDGER_PAGE_SIZE, number, size_max))

    def _lose(self, reason: str) -> None:
        self._channel = None
        self._is_open = False
        if self.fast is not None:
            self.fast.set(None)
            self.fast.detach()
            self._native_before = self.fast.count
        exchanges = list(self._pending.values())
        self._pending.clear()
        self._rows.clear()
        self._former_tables.clear()
        self._table = Table()
        log.warning("the link to the engine is over: %s; %d requests are answered with 503", reason, len(exchanges))
        error = _engine_away()
        for exchange in exchanges:
            if exchange.is_streaming:
                exchange.abort_stream()
            else:
                exchange.respond(self._error_format.answer(error, exchange.request))
        self._connect_later()

    # counts

    def _tell_again(self) -> None:
        self._telling = self._loop.call_later(TELLING_S, self._tell_again)
        if self._bodies is not None:
            self._bodies.look()
        self._tell_counts()

    def _tell_counts(self) -> None:
        channel = self._channel
        if channel is None:
            return
        while len(self._told_refused) < len(self.connections):
            self._told_refused.append(Counter())
        for each, told in zip(self.connections, self._told_refused, strict=True):
            for status, count in each.refused.items():
                if count != told[status]:
                    channel.send(wire.REFUSED, status, count - told[status])
                    told[status] = count
        self._tell_times()
        native = 0 if self.fast is None else self.fast.count - self._native_before
        if native != self._told_native:
            self._told_native = native
            channel.send(wire.NATIVE, 0, native)
        count = sum(map(len, self.connections))
        if count != self._told_count:
            self._told_count = count
            channel.send(wire.CONNECTIONS, 0, count)

    def _tell_times(self) -> None:
        """What was done here for requests of models that the engine counts stages of."""
        if self._channel is None:
            return
        if self.fast is not None:
            self.fast.note_times()
        for table in (*self._former_tables, self._table):
            for name, version, times in table.take_times():
                histograms = [stage.histogram()[1:] for stage in (times.preprocess, times.postprocess)]
                self._channel.send(wire.TIMES, 0, 0, b"", wire.ToldTimes(name, version, *histograms).write())


def _encode_nothing(output: Output, row: bytes) -> None:
    """The engine makes the answer, of the request as it was."""


# What native code takes for a tensor and Python does not.
_UNKNOWN = Row(0, b"", _encode_nothing, AS_BYTES)


def _remaining_s(request: Request) -> float | None:
    """How long its client still waits; None if it did not say, or not so that it can be understood."""
    try:
        deadline = client_deadline(request)
    except ServeError:
        return None  # the engine has the words for it
    return max(0.0, (deadline - monotonic_ns()) / 1e9) if deadline else None


def _engine_away() -> OverloadedError:
    return OverloadedError(
        "The engine is being started again; try again later.",
        detail={"reason": "no engine"},
        headers={"Retry-After": "1"},
    )
