"""Handlers whose ``handle`` is a coroutine: a task for each request, many at a time, in one event loop.

TorchServe's ``asyncCommunication``: each call has a batch of one and a context of its own. A client that goes away, and
a request over its time limit, cancel their task. A plain ``handle`` is called in the loop too, one request at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import signal
from collections.abc import AsyncGenerator
from types import FrameType
from typing import Any

from pyserve.launch import INTERRUPT
from pyserve.telemetry.custom_metrics import MetricsReport
from pyserve.worker.answer import ANSWER, ERROR, LAST, Answer, Parts
from pyserve.worker.entry_point import EntryPoint
from pyserve.worker.failure import HandlerTimeout
from pyserve.worker.invoker import Call, Invoker
from pyserve.worker.request import DESCRIBE, Item, WorkerRequest

REPORT_INTERVAL_S = 0.1
# A loop that has not turned for so long is held up by the handler that runs.
STUCK_MIN_S = 5 * REPORT_INTERVAL_S


class _RequestParts(Parts):
    """Parts of one request's answer."""

    def __init__(self, channel: Any, batch: int, cancelled: set[int]):
        self._channel = channel
        self._batch = batch
        self._cancelled = cancelled

    def send(self, answer: Answer) -> None:
        """Sends one part."""
        self._channel.send(self._batch, [answer])

    def is_cancelled(self, ticket: int) -> bool:
        """Whether its client has gone. The channel is not asked: what it reads meanwhile would wake nobody."""
        return ticket in self._cancelled


def serve_coroutines(channel: Any, invoker: Invoker, entry: EntryPoint, report: MetricsReport) -> None:
    """Serves until the server closes the channel, which raises EOFError here."""
    entry.run(_Server(channel, invoker, entry, report).serve())


class _Server:
    def __init__(self, channel: Any, invoker: Invoker, entry: EntryPoint, report: MetricsReport):
        self._channel = channel
        self._invoker = invoker
        self._entry = entry
        self._report = report
        self._tasks: dict[int, asyncio.Task[Answer]] = {}  # by ticket
        self._cancelled: set[int] = set()  # of those the tickets whose clients have gone
        self._ended: asyncio.Future[None] = entry.loop.create_future()
        self._turned_at = entry.loop.time()

    async def serve(self) -> None:
        """Until the server closes the channel: raises EOFError."""
        loop = asyncio.get_running_loop()
        # Readable again and again until everything has been taken.
        loop.add_reader(self._channel.fileno(), self._take)
        loop.call_soon(self._take)
        reporting = loop.create_task(self._keep_reporting())
        signal.signal(INTERRUPT, self._interrupt)
        try:
            await self._ended
        finally:
            signal.signal(INTERRUPT, signal.SIG_IGN)
            reporting.cancel()
            loop.remove_reader(self._channel.fileno())
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _take(self) -> None:
        """What has come: requests, and news of clients that have gone."""
        try:
            while (batch := self._channel.receive(0)) is not None:
                self._channel.begin(batch.id)
                for item in batch.items:
                    self._begin(batch.id, item)
        except EOFError as error:
            if not self._ended.done():
                self._ended.set_exception(error)
            return
        for ticket in self._channel.cancelled_tickets():
            task = self._tasks.get(ticket)
            if task is not None and ticket not in self._cancelled:  # once: it may be cleaning up
                self._cancelled.add(ticket)
                task.cancel()

    def _begin(self, batch: int, item: Item) -> None:
        if item[1] & DESCRIBE:
            request, refusal = WorkerRequest(item), None
        else:
            request, refusal = self._invoker.read(item)
        if refusal is not None:
            self._channel.send(batch, [refusal])
            return
        loop = asyncio.get_running_loop()
        # Calls overlap: each has a copy of the context, as in TorchServe.
        call = Call(
            self._invoker, [request], parts=_RequestParts(self._channel, batch, self._cancelled),
            context=self._invoker.context_copy(),
        )  # fmt: skip
        began = loop.time()
        task = self._tasks[request.ticket] = loop.create_task(self._answer(call, request))

        # Not at the end of the task itself, which may be cancelled before it has begun.
        def end(task: asyncio.Task[Answer]) -> None:
            self._end(batch, call, request, task)
            self._report.note_prediction(loop.time() - began)

        task.add_done_callback(end)

    def _end(self, batch: int, call: Call, request: WorkerRequest, task: asyncio.Task[Answer]) -> None:
        """Sends the answer; every request has one, also if nobody reads it."""
        self._tasks.pop(request.ticket, None)
        call.close()
        is_cancelled = request.ticket in self._cancelled
        self._cancelled.discard(request.ticket)
        if is_cancelled:
            answer: Answer = (request.ticket, LAST if call.has_streamed else ANSWER, 200, b"", b"")
        elif task.cancelled():
            answer = self._invoker.fail_element(request, asyncio.CancelledError("the handler cancelled itself"))
        else:
            error = task.exception()
            answer = task.result() if error is None else self._invoker.fail_element(request, error)
        with contextlib.suppress(EOFError):  # `_take` sees that too
            self._channel.send(batch, [answer])
        if answer[1] == ERROR:
            self._invoker.leave_if_lost()

    # --- a request ------------------------------------------------------------------------------------------------

    async def _answer(self, call: Call, request: WorkerRequest) -> Answer:
        """The final answer of one request. Parts of it are sent meanwhile."""
        try:
            returned = self._entry(call.rows, call.context)
            if inspect.isawaitable(returned):
                returned = await returned
            if _is_stream(returned):
                returned = [await self._drain(returned, call, is_batch=True)]
            (result,) = call.checked(returned)
            if _is_stream(result):
                result = await self._drain(result, call, is_batch=False)
            kind = LAST if call.has_streamed else ANSWER
            return self._invoker.encode(result, request, call.context, 0, kind=kind)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # SystemExit and the like too, which would end the loop
            return self._invoker.fail_element(request, error)

    @staticmethod
    async def _drain(stream: Any, call: Call, *, is_batch: bool) -> Any:
        """The last part; the others are sent. A part of a batch may be a list of one element."""
        held: Any = b""
        is_first = True
        async with contextlib.aclosing(_parts_of(stream)) as parts:
            async for part in parts:
                if not is_first:
                    call.send_part(0, held, call.context)
                one = part[0] if is_batch and isinstance(part, list) and len(part) == 1 else part
                held = call.settled(0, one)
                is_first = False
        return held

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """INTERRUPT: the server has had no answer for response_timeout. Ends a call that holds up the loop.

        A request that waits for something was cancelled already.
        """
        loop = self._entry.loop
        if loop.time() - self._turned_at < STUCK_MIN_S:
            return
        if asyncio.current_task(loop) in self._tasks.values():
            self._turned_at = loop.time()
            raise HandlerTimeout("the call went on past response_timeout without leaving the event loop to others")

    async def _keep_reporting(self) -> None:
        while True:
            self._turned_at = self._entry.loop.time()
            self._report.look()
            await asyncio.sleep(REPORT_INTERVAL_S)


def _is_stream(value: Any) -> bool:
    return inspect.isasyncgen(value) or inspect.isgenerator(value)


async def _parts_of(stream: Any) -> AsyncGenerator[Any, None]:
    """The parts of a generator of either kind; ends it when nobody wants them any more."""
    try:
        if inspect.isasyncgen(stream):
            async for part in stream:
                yield part
        else:
            for part in stream:
                yield part
                await asyncio.sleep(0)  # the others' turn
    finally:
        if inspect.isasyncgen(stream):
            await stream.aclose()
        else:
            stream.close()
