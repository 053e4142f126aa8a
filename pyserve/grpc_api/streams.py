"""Calls in which both sides stream: requests run at once, and their answers leave in the order of the requests.

A request that is answered before those ahead of it keeps its answer, its place among STREAM_REQUESTS_MAX and its bytes
in the budget until they are answered too.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

from pyserve.errors import ServeError
from pyserve.request.body_budget import BodyBudget, body_budget_error

# Of one stream of requests: how many may be under way, those whose answers are held back among them.
STREAM_REQUESTS_MAX = 128


class Begun(NamedTuple):
    """A request that has begun.

    Attributes:
        order: requests that have this in common are answered in their order.
        answers: any number; those of one request leave in the order they were made.
    """

    order: str
    answers: AsyncGenerator[Any, None]


Begin = Callable[[Any], Begun]


class Streams:
    """All such calls of a server. Loop thread only.

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

    async def run(self, requests: AsyncIterator[Any], begin: Begin) -> AsyncIterator[Any]:
        """The answers to all ``requests``, which are messages. ``begin`` is called in their order and must not raise.

        Raises:
            OverloadedError: there is no room for the bytes of a request.
        """
        stream = _Stream(self._budget, begin)
        reader = asyncio.ensure_future(self._read(stream, requests))
        self._readers.add(reader)
        try:
            while (answer := await stream.answers.get()) is not None:
                yield answer
            if stream.failures:
                raise stream.failures[0]
        finally:
            self._readers.discard(reader)
            for task in (reader, *stream.running):
                task.cancel()

    async def _read(self, stream: _Stream, requests: AsyncIterator[Any]) -> None:
        own = asyncio.current_task()
        try:
            async for request in requests:
                await stream.start(request)
        except asyncio.CancelledError:
            if own in self._readers:  # it was not `drain`
                raise
        except Exception as error:
            stream.failures.append(error)
        self._readers.discard(own)
        await stream.end()


class _Stream:
    """One such call.

    Attributes:
        answers: what waits for the client; None ends the call. What waits, waits with its request, which is counted.
        failures: what ends the call with an error.
        running: requests whose answers have not all left.
    """

    def __init__(self, budget: BodyBudget, begin: Begin) -> None:
        self.answers: asyncio.Queue[Any | None] = asyncio.Queue(1)
        self.failures: list[Exception] = []
        self.running: set[asyncio.Task[None]] = set()
        self._budget = budget
        self._begin = begin
        self._room = asyncio.Semaphore(STREAM_REQUESTS_MAX)
        self._turn = asyncio.Lock()  # unlike the queue's own wait it is fair: answers leave in the order they were told
        self._last: dict[str, asyncio.Task[None]] = {}  # by order: the request that the next one stands behind

    async def start(self, request: Any) -> None:
        """Begins a request, once there is room for it.

        Raises:
            OverloadedError: there is none for its bytes.
        """
        await self._room.acquire()
        size = request.ByteSize()
        await self._reserve(size)
        begun = self._begin(request)
        task = asyncio.ensure_future(self._forward(begun.answers, self._last.get(begun.order)))
        self._last[begun.order] = task
        self.running.add(task)

        def over(task: asyncio.Task[None]) -> None:
            self.running.discard(task)
            if self._last.get(begun.order) is task:
                del self._last[begun.order]
            self._budget.release(size)
            self._room.release()

        task.add_done_callback(over)

    async def end(self) -> None:
        """Ends the call when all requests are answered."""
        while self.running:
            await asyncio.wait(set(self.running))
        await self._tell(None)

    async def _reserve(self, size: int) -> None:
        while not self._budget.reserve(size):
            if not self.running:
                raise body_budget_error(self._budget)
            await asyncio.wait(set(self.running), return_when=asyncio.FIRST_COMPLETED)

    async def _forward(self, answers: AsyncGenerator[Any, None], before: asyncio.Task[None] | None) -> None:
        try:
            async with aclosing(answers):
                async for answer in answers:
                    await _over(before)
                    await self._tell(answer)
            await _over(before)  # else a request without an answer would let the next one pass
        except Exception as error:  # without this that request would have no answer, and the client wait for it
            self.failures.append(error)
            await self._tell(None)

    async def _tell(self, answer: Any | None) -> None:
        async with self._turn:
            await self.answers.put(answer)


async def _over(task: asyncio.Task[None] | None) -> None:
    if task is not None and not task.done():
        await asyncio.wait((task,))


def with_position(error: ServeError, position: int) -> ServeError:
    """``error`` with the position of its request in the stream, from 0."""
    positioned = copy.copy(error)  # others may have the same one
    positioned.detail = {"position": position, **error.detail}
    return positioned
