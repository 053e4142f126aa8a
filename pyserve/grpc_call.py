"""One gRPC call, and a request on its way from it through a model.

A request takes the way of HTTP's: the same admission, batches, limits, metrics and errors.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar
from urllib.parse import unquote

from pyserve.errors import OverloadedError, ServeError, TooLargeError
from pyserve.http1_answer import new_id
from pyserve.http1_connections import BodyBudget
from pyserve.http1_exchange import Exchange, Part
from pyserve.http1_head import REQUEST_ID
from pyserve.messages import TIMING_HEADERS, Headers, Request, Response

log = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
# What of a call's metadata is a header of its requests: the trace that it is part of, and what it asks about time.
FORWARDED_KEYS = frozenset({"traceparent", "tracestate"}) | TIMING_HEADERS
# Bytes of a streamed answer that wait for a client that does not read them; as in HTTP.
STREAM_BACKLOG_MAX = 4 << 20
# Of one stream of requests: how many may be under way.
STREAM_REQUESTS_MAX = 128

Told = TypeVar("Told")


class Call:
    """One call. Loop thread only.

    Attributes:
        context: grpc's.
        path: ``/package.Service/Method``.
        id: the client's ``x-request-id``, if it is a valid one, else a new one.
        arrived_at: ns of ``time.monotonic_ns()``.
        headers: what handlers see of the metadata.
        authorization: of the metadata; ``""`` if there is none.
        has_timing: it asks something about time.
        is_counted: a model counts its answer in the metrics.
        told: metadata that goes with the answer.
    """

    __slots__ = (
        "arrived_at", "authorization", "context", "has_timing", "headers", "id", "is_counted", "path", "told",
    )  # fmt: skip

    def __init__(self, context: Any, path: str):
        self.context = context
        self.path = path
        self.arrived_at = time.monotonic_ns()
        self.id = ""
        self.authorization = ""
        self.is_counted = self.has_timing = False
        self.told: Headers = []
        self.headers: Headers = []
        for key, value in context.invocation_metadata() or ():
            if key == REQUEST_ID_KEY:
                self.id = value if REQUEST_ID.match(value) else ""
            elif key == "authorization":
                self.authorization = value
            elif key in FORWARDED_KEYS and "\n" not in value:
                self.headers.append((key, value))
                self.has_timing = self.has_timing or key in TIMING_HEADERS
        self.id = self.id or new_id()

    @property
    def client(self) -> str:
        """``127.0.0.1:43090``, as of HTTP's requests."""
        return unquote(self.context.peer()).partition(":")[2]

    def request(
        self, *, headers: Headers | None = None, body: bytearray | None = None, query: str = "", id: str = "",
        is_new: bool = False,
    ) -> Request:  # fmt: skip
        """A request for a model that this call makes; one that ``is_new`` came after the call had begun."""
        remaining_s = self.context.time_remaining()
        request = Request(
            "POST", self.path, query=query, headers=self.headers + (headers or []), body=body, client=self.client,
            id=id or self.id, arrived_at=time.monotonic_ns() if is_new else self.arrived_at,
        )  # fmt: skip
        request.has_timing = self.has_timing
        if remaining_s is not None:
            request.deadline = time.monotonic_ns() + max(1, int(remaining_s * 1e9))
            request.has_timing = True
        return request


class Prediction:
    """A request on its way through a model, to be waited for. Whoever waits no more has hung up."""

    def __init__(self, request: Request, size_max: int):
        """``size_max`` is that of an answer whose parts are joined, in bytes."""
        self.exchange = Exchange(request, self._on_news)
        self._parts_size_max = size_max
        self._refusal: ServeError | None = None
        self._news: asyncio.Future[None] | None = None

    def _on_news(self, exchange: Exchange) -> None:
        if exchange.parts_size > self._parts_size_max:
            self._refusal = TooLargeError(
                f"the parts of the answer that wait have {exchange.parts_size} bytes, of at most "
                f"{self._parts_size_max}: read them faster, or ask for a stream",
                detail={"reason": "parts", "request_id": exchange.request.id},
            )
            exchange.disconnect()
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def _wait(self) -> None:
        self._check_refusal()
        self._news = asyncio.get_running_loop().create_future()
        await self._news
        self._check_refusal()

    def _check_refusal(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    async def answer(self) -> Response:
        """The whole answer; that of a handler that streams is joined.

        Raises:
            ServeError: it is an error.
        """
        exchange = self.exchange
        try:
            while exchange.response is None or (exchange.is_streaming and not exchange.is_ended):
                await self._wait()
        except BaseException:
            exchange.disconnect()
            raise
        response = exchange.response
        _check(exchange.failure or response)
        if exchange.is_streaming:
            response.body = b"".join(exchange.parts)
        return response

    async def parts(self) -> AsyncIterator[Part]:
        """The parts as they come; an answer that is not streamed is one part.

        Raises:
            ServeError: it is an error, or became one.
        """
        self._parts_size_max = STREAM_BACKLOG_MAX
        exchange = self.exchange
        is_complete = False
        try:
            while exchange.response is None:
                await self._wait()
            _check(exchange.response)
            if not exchange.is_streaming:
                is_complete = True
                yield exchange.response.body
                return
            while True:
                parts, exchange.parts, exchange.parts_size = exchange.parts, [], 0
                is_complete = exchange.is_ended
                for part in parts:
                    yield part
                self._check_refusal()
                if is_complete:
                    break
                if not exchange.parts and not exchange.is_ended:
                    await self._wait()
            _check(exchange.failure)
        finally:
            if not is_complete:
                exchange.disconnect()


def _check(response: Response | None) -> None:
    if response is not None and response.error is not None:
        raise response.error


class Streams:
    """Calls in which both sides stream: each request is begun when it comes, and answers leave as they come.

    Args:
        budget: each request counts in it until its answers have left; a call that is over it is read no further while
            others of its requests run.

    Attributes:
        is_draining: no more requests are read.
    """

    def __init__(self, budget: BodyBudget) -> None:
        self.is_draining = False
        self._budget = budget
        self._readers: set[asyncio.Task[None]] = set()  # that may have more to read

    def drain(self) -> None:
        """Reads no more requests; the calls end when those that were read are answered."""
        self.is_draining = True
        readers, self._readers = self._readers, set()
        for reader in readers:
            reader.cancel()

    async def run(
        self, requests: AsyncIterator[Any], begin: Callable[[Any], AsyncIterator[Told]]
    ) -> AsyncIterator[Told]:
        """The answers to all ``requests``, which are messages. ``begin`` is called in their order and must not raise.

        Raises:
            OverloadedError: there is no room for the bytes of a request.
        """
        answers: asyncio.Queue[Told | None] = asyncio.Queue(1)  # what waits, waits with its request, which is counted
        turn = asyncio.Lock()  # unlike the queue's own wait it is fair: answers leave in the order they were made
        running: set[asyncio.Task[None]] = set()
        room = asyncio.Semaphore(STREAM_REQUESTS_MAX)
        failures: list[Exception] = []

        async def tell(answer: Told | None) -> None:
            async with turn:
                await answers.put(answer)

        async def forward(stream: AsyncIterator[Told]) -> None:
            try:
                async for each in stream:
                    await tell(each)
            except Exception as error:  # else that request would have no answer, and the client wait for it
                failures.append(error)
                await tell(None)

        async def reserve(size: int) -> None:
            while not self._budget.reserve(size):
                if not running:
                    raise body_budget_error(self._budget)
                await asyncio.wait(set(running), return_when=asyncio.FIRST_COMPLETED)

        def start(request: Any, size: int) -> None:
            task = asyncio.ensure_future(forward(begin(request)))
            running.add(task)

            def over(task: asyncio.Task[None]) -> None:
                running.discard(task)
                self._budget.release(size)
                room.release()

            task.add_done_callback(over)

        async def read() -> None:
            own = asyncio.current_task()
            try:
                async for request in requests:
                    await room.acquire()
                    size = request.ByteSize()
                    await reserve(size)
                    start(request, size)
            except asyncio.CancelledError:
                if own in self._readers:  # it was not `drain`
                    raise
            except Exception as error:
                failures.append(error)
            self._readers.discard(own)
            while running:
                await asyncio.wait(set(running))
            await tell(None)

        reader = asyncio.ensure_future(read())
        self._readers.add(reader)
        try:
            while (answer := await answers.get()) is not None:
                yield answer
            if failures:
                raise failures[0]
        finally:
            self._readers.discard(reader)
            for task in (reader, *running):
                task.cancel()


def body_budget_error(budget: BodyBudget) -> OverloadedError:
    """There is no room for the bytes of one more request."""
    return OverloadedError(
        "The server holds as many request bodies as it may; retry later.",
        detail={"reason": "body budget", "body_budget_size": budget.size_max},
        headers={"Retry-After": "1"},
    )
