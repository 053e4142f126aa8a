"""The process that runs a model's requests again for the audit: alone, one by one, and without anything that is there
for speed.

It is a worker process like those of the python lane, but seen by nobody: neither metrics nor the access log nor the
queue of the model know of it, it takes no threads from the others, and the kernel runs it when nothing else wants to.

Loop thread only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from pyserve.errors import HandlerError, OverloadedError
from pyserve.lanes.lane import Lane
from pyserve.lanes.pending import Pending
from pyserve.lanes.python import PythonLane
from pyserve.lanes.refusals import worker_died_error
from pyserve.lanes.resources import Services
from pyserve.lanes.settings import ModelSettings
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request, Response
from pyserve.telemetry.metrics import Metrics
from pyserve.worker.spec import WorkerSpec


class Repetition(NamedTuple):
    """How a request of some protocol is run again.

    Attributes:
        again: makes of a copy of its exchange what a lane takes.
        body: all of the request, of a protocol whose exchange does not hold it; what the copy has as its body.
        read: the outputs in an answer's body, of a protocol that `audit_compare` does not know.
    """

    again: Callable[[Lane, Exchange], Pending]
    body: Callable[[], bytes] | None = None
    read: Callable[[bytes], Any] | None = None


# Of the first worker, beside the model's own, in names for the log.
_WORKER_NUMBER = 900


class AuditLane(PythonLane):
    """One worker, no batches."""

    def __init__(
        self, services: Services, spec: WorkerSpec, label: str, settings: ModelSettings, *,
        interpreter: str | None = None,
    ):  # fmt: skip
        own = replace(
            settings, workers_min=1, workers_max=1, batch_size=1, min_batch=1, client_timeout_ms=0,
            use_job_ticket=False,
        )  # fmt: skip
        # Whoever looks at metrics must not count a request twice.
        unseen = replace(services, metrics=Metrics(), tracer=None)
        super().__init__(
            unseen, replace(spec, is_audit=True, batch_size=1, gpu_id=None), label, own, interpreter=interpreter,
            worker_number=_WORKER_NUMBER,
        )  # fmt: skip

    def set_workers(self, count: int) -> None:
        """Without a share of the CPUs: threads of other models do not become fewer."""
        self.core.set_intra_op_threads(1)
        self.apply_limits()
        self.workers.set_count(count)

    async def ask(self, request: Request, again: Callable[[Lane, Exchange], Pending]) -> Response | str:
        """The model's answer to ``request``, errors of its code included; in a few words why there is none.

        ``request`` has no other owner.
        """
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def deliver(exchange: Exchange) -> None:
            if (exchange.is_ended or not exchange.is_streaming) and not answered.done():
                answered.set_result(None)

        request.arrived_at = time.monotonic_ns()
        exchange = Exchange(request, deliver)
        try:
            self.predict(again(self, exchange))
            await answered
        except BaseException:
            exchange.disconnect()
            raise
        response = exchange.response
        if response is None or exchange.is_aborted:
            return "cannot be repeated"
        reason = _no_answer_reason(response)
        if reason:
            return reason
        if exchange.is_streaming:
            response.body = b"".join(exchange.parts)
        return response

    async def end(self) -> None:
        """Ends the process at once, whatever it does."""
        self.answer_all(self.refusal("draining"))
        for row in self.core.workers():
            self.workers.kill(row["id"], "the audit is over")
        await self.close()


def _no_answer_reason(response: Response) -> str:
    """What became of the process, if that is what the answer reports; ``""`` for one of the model's code."""
    error = response.error
    if error is None:
        return ""
    if isinstance(error, OverloadedError):
        return "no process"
    if error.status == 507:
        return "out of memory"
    if error.status == 504:
        return "too slow"
    if error.message == worker_died_error().message:
        return "process died"
    # One that the server made of the request: this lane cannot read what the other can.
    return "" if isinstance(error, HandlerError) else "cannot be repeated"
