"""One gRPC call, and a request on its way from it through a model.

A request takes the way of HTTP's: the same admission, batches, limits, metrics and errors.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import unquote

from pyserve.errors import ServeError, TooLargeError
from pyserve.request.exchange import Exchange, Part
from pyserve.request.ids import REQUEST_ID, new_id
from pyserve.request.messages import TIMING_HEADERS, Headers, Request, Response

log = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
# What of a call's metadata is a header of its requests: the trace that it is part of, and what it asks about time.
FORWARDED_KEYS = frozenset({"traceparent", "tracestate"}) | TIMING_HEADERS
# Bytes of a streamed answer that wait for a client that does not read them; as in HTTP.
STREAM_BACKLOG_MAX = 4 << 20


class CallRequest(Request):
    """A request that a call makes."""

    __slots__ = ()
    is_http = False


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
        client: ``127.0.0.1:43090``, as of HTTP's requests.
    """

    __slots__ = (
        "arrived_at", "authorization", "client", "context", "has_timing", "headers", "id", "is_counted", "path", "told",
    )  # fmt: skip

    def __init__(self, context: Any, path: str):
        self.context = context
        self.path = path
        # Now: to ask a call that the client has left crashes the process, in grpc's own code.
        self.client = unquote(context.peer()).partition(":")[2]
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

    def request(
        self, *, headers: Headers | None = None, body: bytearray | None = None, query: str = "", id: str = "",
        is_new: bool = False,
    ) -> Request:  # fmt: skip
        """A request for a model that this call makes; one that ``is_new`` came after the call had begun."""
        remaining_s = self.context.time_remaining()
        request = CallRequest(
            "POST", self.path, query=query, headers=self.headers + (headers or []), body=body, client=self.client,
            id=id or self.id, arrived_at=time.monotonic_ns() if is_new else self.arrived_at,
        )  # fmt: skip
        request.has_timing = self.has_timing
        if remaining_s is not None:
            request.deadline = time.monotonic_ns() + max(1, int(remaining_s * 1e9))
            request.has_timing = True
        return request


class Prediction:
    """A request on its way through a model, to be waited for. A client that no longer waits has hung up."""

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

    async def parts(self) -> AsyncGenerator[Part, None]:
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
