"""Handlers whose ``handle`` is a coroutine: a task for each request, many at a time, in one event loop.

TorchServe's ``asyncCommunication``: each call has a batch of one and a context of its own. A client that goes away, and
a request over its time limit, cancel their task.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from pyserve.custom_metrics import MetricsReport
from pyserve.entry_point import EntryPoint
from pyserve.invoker import ANSWER, DESCRIBE, LAST, Answer, Call, Invoker, Parts, WorkerRequest

REPORT_INTERVAL_S = 0.1


class _RequestParts(Parts):
    """Parts of one request's answer."""

    def __init__(self, channel: Any, batch: int):
        self._channel = channel
        self._batch = batch

    def send(self, answer: Answer) -> None:
        """Sends one part."""
        self._channel.send(self._batch, [answer])


def serve_coroutines(channel: Any, invoker: Invoker, entry: EntryPoint, report: MetricsReport) -> None:
    """Serves until the server closes the channel, which raises EOFError here."""
    entry.run(_Server(channel, invoker, entry, report).serve())


class _Server:
    def __init__(self, channel: Any, invoker: Invoker, entry: EntryPoint, report: MetricsReport):
        self._channel = channel
        self._invoker = invoker
        self._entry = entry
        self._report = report
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by ticket
        self._ended: asyncio.Future[None] = entry.loop.create_future()

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        # Readable again and again until everything has been taken.
        loop.add_reader(self._channel.fileno(), self._take)
        loop.call_soon(self._take)
        reporting = loop.create_task(self._keep_reporting())
        try:
            await self._ended
        finally:
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
            if task is not None:
                task.cancel()

    def _begin(self, batch: int, item: Any) -> None:
        if item[1] & DESCRIBE:
            request, refusal = WorkerRequest(item), None
        else:
            request, refusal = self._invoker.read(item)
        if refusal is not None:
            self._channel.send(batch, [refusal])
            return
        task = asyncio.get_running_loop().create_task(self._answer(batch, request))
        self._tasks[request.ticket] = task
        task.add_done_callback(lambda _: self._tasks.pop(request.ticket, None))

    async def _answer(self, batch: int, request: WorkerRequest) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        call = Call(self._invoker, [request], parts=_RequestParts(self._channel, batch))
        try:
            returned = self._entry(call.rows, call.context)
            if inspect.isasyncgen(returned):
                returned = [await self._drain(returned, call)]
            elif inspect.isawaitable(returned):
                returned = await returned
            (result,) = call.checked(returned)
            kind = LAST if call.has_streamed else ANSWER
            answer = self._invoker.encode(result, request, call.context, 0, kind=kind)
        except asyncio.CancelledError:
            # Nobody reads it; the server wants to know that the request is over.
            answer = (request.ticket, LAST if call.has_streamed else ANSWER, 200, b"", b"")
        except BaseException as error:  # SystemExit and the like too
            answer = self._invoker.fail_element(request, error)
        self._channel.send(batch, [answer])
        self._report.note_prediction(loop.time() - began)

    @staticmethod
    async def _drain(parts: Any, call: Call) -> Any:
        held: Any = b""
        is_first = True
        async for part in parts:
            if not is_first:
                call.send_part(0, held, call.context)
            held, is_first = part, False
        return held

    async def _keep_reporting(self) -> None:
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            self._report.look()
