"""What the connections of one listener share: the list of them, the byte budget, the way to their end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from pyserve.errors import OverloadedError, ServeError
from pyserve.http1.answer import AnswerWriter
from pyserve.http1.compression import Compression
from pyserve.http1.head import HeadReader
from pyserve.http1.limits import Http1Limits
from pyserve.request.body_budget import BodyBudget
from pyserve.request.descriptors import REFUSED, UNLIMITED
from pyserve.request.messages import ErrorFormat, Request, Response

_REFUSED_COUNT_MAX = 128


def _note_nothing(request: Request, status: int, is_http11: bool) -> None:
    """Nobody wants to know of answers."""


class Connection(Protocol):
    """What ``Connections`` asks of its members."""

    def drain(self) -> None:
        """Closes once idle for a moment, else after the last answer."""

    def abort(self) -> None:
        """Closes at once, whatever is under way."""


class Connections:
    """The open connections of one listener. Loop thread only.

    Args:
        decorate: adds headers to every answer as it is written, such as those that browsers want to see.
        takes_ids: a request keeps its client's ``x-request-id``.
        compression: of answers; None for none.

    Attributes:
        error_format: how errors become answers, of every API: the path says in whose form.
        limits: the listener's limits.
        budget: bytes of bodies in flight.
        heads: reads the heads of requests.
        answers: builds the heads of answers.
        clock: ns, monotonic; stamps ``Request.arrived_at``.
        parting: whether each answer is its connection's last, and says so.
        draining: whether idle connections are closed, too.
        refused: answers the protocol gave itself, without asking the app, counted by status.
        descriptor_limit: connections have descriptors below this, see `pyserve.request.descriptors`.
        on_parting: called once `parting` is set.
        on_answer: told of each answer as it is written, a streamed one at its first part: the request, the status, and
            whether the client speaks HTTP/1.1.
    """

    def __init__(
        self,
        limits: Http1Limits,
        budget: BodyBudget | None = None,
        *,
        decorate: Callable[[Request, Response], None] | None = None,
        takes_ids: bool = True,
        error_format: ErrorFormat | None = None,
        compression: Compression | None = None,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], int] = time.monotonic_ns,
    ):
        self.compression = compression
        self.limits = limits
        self.budget = budget or BodyBudget(limits.body_budget_size)
        self.error_format = error_format or ErrorFormat()
        self.answers = AnswerWriter(wall_clock, decorate, self.error_format)
        self.heads = HeadReader(limits, takes_ids=takes_ids)
        self.clock = clock
        self.parting = False
        self.draining = False
        self.refused: Counter[int] = Counter()
        self.on_parting: Callable[[], object] = bool
        self.on_answer: Callable[[Request, int, bool], None] = _note_nothing
        self.descriptor_limit: Callable[[], int] = lambda: UNLIMITED
        self._open: set[Connection] = set()
        self._over: set[Connection] = set()
        self._gone: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        """Open connections, refused ones that are still lingering not counted."""
        return len(self._open)

    @property
    def members(self) -> tuple[Connection, ...]:
        """The open ones, see `__len__`."""
        return tuple(self._open)

    def add(self, connection: Connection, descriptor: int = -1) -> ServeError | None:
        """Registers a new connection; returns why it is refused, if it is one too many.

        A connection that is refused stays registered until ``remove``, so that it can still be told why; too many of
        those are cut off at once.
        """
        descriptor_limit = self.descriptor_limit()
        if len(self._open) < self.limits.connection_count_max and descriptor < descriptor_limit:
            self._open.add(connection)
            return None
        self._over.add(connection)
        if len(self._over) > _REFUSED_COUNT_MAX or descriptor >= descriptor_limit + REFUSED:
            connection.abort()
        why = f"The limit of {self.limits.connection_count_max} connections is reached; try again later."
        if descriptor >= descriptor_limit:
            why = "There are as many connections as the limit of open files allows; try again later."
        return OverloadedError(why, headers={"Retry-After": "1"})

    def remove(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._over.discard(connection)
        if self._gone is not None and not self._gone.done() and not self._open and not self._over:
            self._gone.set_result(None)

    def part(self) -> None:
        """Has every answer from now on say that its connection is closed; idle connections stay, and new ones may come.

        So clients that ask again soon learn that they have to connect anew, and lose nothing by it.
        """
        self.parting = True
        self.on_parting()

    async def drain(self) -> None:
        """Closes idle connections and, after their answers, busy ones; returns when all are gone.

        Waits as long as that takes: give it a time with ``asyncio.wait_for`` and call ``abort`` after it.
        """
        self.start_drain()
        if self._open or self._over:
            if self._gone is None or self._gone.done():
                self._gone = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._gone)

    def start_drain(self) -> None:
        """The first half of ``drain``: says so to every connection and returns."""
        self.parting = self.draining = True
        self.on_parting()
        for connection in tuple(self._open):
            connection.drain()

    def abort(self) -> None:
        """Cuts off every connection."""
        for connection in (*self._open, *self._over):
            connection.abort()
