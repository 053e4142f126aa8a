"""A request on its way through a lane: from admission to its one answer."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from pyserve.request.deadline import client_deadline
from pyserve.request.exchange import Exchange
from pyserve.request.stages import Stages, asked_stages

if TYPE_CHECKING:
    import torch

    from pyserve.context import RequestProcessor

PREPARING, SUBMITTED, OVER = range(3)


class Pending:
    """One admitted request. Loop thread only, but for ``exchange.request`` being read while preprocessing.

    Attributes:
        lane: what it runs on; has ``complete``, ``expire`` and ``cancel``.
        arrived_at: ns; since when it waits.
        version: the model's.
        url_version: the version as in the URL, ``default`` if it named none.
        flags: of the item, as a worker process sees them.
        query_is_input: whether the query's parameters are inputs of the handler.
        ticket: the engine's, once submitted.
        stage: PREPARING, SUBMITTED or OVER. It moves forward only, and only the move to OVER answers.
        started_at: ns; when its batch began to run; 0 until its completion tells.
        is_error: its answer says that it failed, and is none of its handler's.
        is_raw: it is answered with the bytes of its row of the output, see `raw_rows`.
        preprocess_ns: how long its body took to become an input, ns.
        progress_at: ns; when the last part came; 0 if none did.
        client_deadline: ns; when its client stops waiting; 0 if it did not say.
        stages: where its time goes; None if nobody asks.
        limit_timer: fires at ``client_deadline``; the lane's.
        processor: what an own handler in the native lane has set for the answer while it preprocessed; else None.

    Attributes of rows and their wholes, see `row_requests`:
        inputs: what the network gets; None to have the handler make it of the body.
        wants_tensors: whether the network's output is wanted, not the handler's answer.

    Raises:
        BadRequestError: what the client says about time cannot be understood.
    """

    __slots__ = (
        "arrived_at", "client_deadline", "exchange", "flags", "is_error", "is_raw", "lane", "limit_timer",
        "preprocess_ns", "processor", "progress_at", "query_is_input", "stage", "stages", "started_at", "ticket",
        "url_version", "version",
    )  # fmt: skip

    wants_tensors = False
    is_counted = True  # among the requests of its model
    inputs: list[torch.Tensor] | None = None

    def __init__(  # noqa: PLR0917 - made for every request
        self, lane: Any, exchange: Exchange, version: str, url_version: str, query_is_input: bool = False,
        flags: int = 0,
    ):  # fmt: skip
        self.lane = lane
        self.exchange = exchange
        self.arrived_at = exchange.request.arrived_at
        self.version = version
        self.url_version = url_version
        self.query_is_input = query_is_input
        self.flags = flags
        self.ticket = 0
        self.stage = PREPARING
        self.started_at = 0
        self.is_raw = self.is_error = False
        self.processor: RequestProcessor | None = None
        self.progress_at = self.preprocess_ns = 0
        self.client_deadline = 0
        self.stages: Stages | None = None
        if exchange.request.has_timing:
            self.client_deadline = client_deadline(exchange.request)
            self.stages = asked_stages(exchange.request)
        self.limit_timer: asyncio.TimerHandle | None = None

    # --- what the lane asks of every kind of request --------------------------------------------------------------

    @property
    def kept(self) -> Any:
        """What its model has made of it already, see `kept_output`; None of almost all."""
        return self.exchange.kept

    def begin(self) -> None:
        """Called once it is admitted."""
        self.lane.begin(self)

    def drop(self) -> None:
        """Keeps it from running, or its result from being used."""
        if self.stage == SUBMITTED:
            self.lane.core.cancel(self.ticket)

    def observe(self, status: int | None) -> None:
        """Called at its end, to be counted. ``status``: of its answer; None if its client hung up."""
        self.lane.observe(self, status)

    @property
    def is_swept(self) -> bool:
        """Whether the lane's time limits are for this one."""
        return True

    @property
    def was_submitted(self) -> bool:
        """Whether a worker may have seen of it, as long as it is not OVER."""
        return self.stage == SUBMITTED

    def began_at(self) -> int:
        """When it began to run, ns; 0 while it waits; -1 if it has ended and its answer is on the way."""
        return int(self.lane.core.started_at(self.ticket)) if self.stage == SUBMITTED else 0

    # --------------------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """The client hung up."""
        self.lane.cancel(self)

    def queue_s(self) -> float:
        """From arrival until a worker took it; 0 if none did."""
        return (self.started_at - self.arrived_at) / 1e9 if self.started_at else 0.0

    def remaining_s(self) -> float | None:
        """How long the client still waits; None if it did not say."""
        return max(0.0, (self.client_deadline - time.monotonic_ns()) / 1e9) if self.client_deadline else None

    def client_limit_ms(self) -> int:
        """What the client asked for; 0 if nothing."""
        return (self.client_deadline - self.arrived_at) // 1_000_000 if self.client_deadline else 0

    def age_s(self) -> float:
        return (time.monotonic_ns() - self.arrived_at) / 1e9
