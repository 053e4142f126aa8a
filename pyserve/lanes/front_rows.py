"""Requests that the engine takes and answers without Python: of front ends, whose bodies are tensors already, and plain
ones of this process's own connections (`http1.fast_protocol`).

What Python has to do about them is here: their limits, their numbers in the metrics, and what becomes of one that does
not come to an answer of its model: it is taken over as the request that it would have been, and answered as all others.

Loop thread only.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from pyserve.errors import JsonObject, ServerError
from pyserve.lanes.engine_lane import EngineLane
from pyserve.lanes.kept_output import NO_TICKET, KeptOutput
from pyserve.lanes.pending import OVER, SUBMITTED, Pending
from pyserve.lanes.raw_rows import RawRows
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request
from pyserve.telemetry.metrics import REQUEST_BOUNDS_S
from pyserve.telemetry.stage_times import BOUNDS_S, StageTimes

if TYPE_CHECKING:
    from pyserve import _core

log = logging.getLogger(__name__)


class CallLink(Protocol):
    """The front end, or the connection, that a request came from."""

    def adopt(self, ticket: int, head: bytes) -> Exchange | None:
        """The request with this number, to be answered from here on; None if it cannot be read."""


Call = tuple[CallLink, int, bytes, str, int]  # link, its ticket, head, version as in the URL, the lane's ticket


class RowsLane(EngineLane):
    """A lane that takes such requests once `open_rows` was called.

    Attributes:
        rows: the engine's part of it; None if every request has to be seen here.
        row_handler: whose requests these are.
        stage_times: of bodies that became tensors, and of outputs that became answers.
        served_as: gives the model that it is the lane of; None if that has gone.
    """

    rows: _core.LaneRows | None = None
    _raw: RawRows | None = None
    served_as: Callable[[], Any] = bool
    row_handler: object = None
    stage_times: tuple[StageTimes, StageTimes]

    def open_rows(self, handler: object) -> None:
        """Has the engine take requests by itself, as far as nobody wants to see each of them."""
        services = self.services
        if self.times_all or self.is_strict or services.metrics.host.log is not None:
            return
        owner: Any = weakref.ref(self)  # or the lane would be kept by what it keeps
        self.rows = services.engine.core.LaneRows(self.core, owner, REQUEST_BOUNDS_S, BOUNDS_S)
        self.row_handler = handler
        services.engine.has_rows = True
        self._set_row_limits()

    def stage_histograms(self) -> JsonObject:
        """``preprocess`` and ``postprocess``, of what was done without Python, too."""
        if self.rows is not None:
            for times, (counts, total_s) in zip(self.stage_times, self.rows.take_stages(), strict=True):
                if counts:
                    times.add(counts, total_s)
        preprocess, postprocess = self.stage_times
        return {"preprocess": preprocess.histogram(), "postprocess": postprocess.histogram()}

    @property
    def takes_rows(self) -> bool:
        """Whether the engine takes such requests now."""
        return self.rows is not None and self.rows.is_open

    def apply_limits(self) -> None:
        """Brings the settings to the engine; they hold from the next batch on."""
        super().apply_limits()
        self._set_row_limits()

    @property
    def in_flight_count(self) -> int:
        """Requests admitted and not answered."""
        return len(self.in_flight) + (0 if self.rows is None else self.rows.count)

    def close_rows(self) -> None:
        """Has the engine take no request by itself any more."""
        self._set_row_limits()  # which is none while it drains

    def take_over(self, *, waiting_only: bool = False) -> None:
        """Has among `in_flight` what only the engine knows so far."""
        if self.rows is not None:
            self._set_row_limits()
            self._take_over(self.rows, self.rows.take_all(waiting_only=waiting_only))

    def take_over_call(self, call: Call) -> None:
        """Has one among `in_flight` that the engine has handed over."""
        if self.rows is not None:
            self._take_over(self.rows, [call])

    def take_over_late(self, now: int) -> None:
        """Has among `in_flight` what only the engine knows so far and is over its time, in front."""
        if self.rows is None:
            return
        self.rows.is_watched = self.rows.count > 0  # else the sweep ends
        if self.rows.count:
            limits = int(self.settings.queue_limit_s * 1e9), int(self.settings.response_timeout_s * 1e9)
            self._take_over(self.rows, self.rows.take_overdue(now, *limits))

    def _note_preparing(self, count: int) -> None:
        super()._note_preparing(count)
        if count:
            self._set_row_limits()

    def _set_row_limits(self) -> None:
        if self.rows is None:
            return
        settings = self.settings
        self.rows.set_limits(
            is_open=not (self.is_draining or settings.use_job_ticket),
            waiting_max=settings.queue_size - self.preparing_count,
            queue_limit_ns=int(settings.queue_limit_s * 1e9),
            answer_size_max=self.services.config.max_response_size,
        )

    def _take_over(self, rows: _core.LaneRows, calls: Iterable[Call]) -> None:
        before = self.in_flight
        self.in_flight = {}
        for link, ticket, head, url_version, request in calls:
            pending = self.adopt(link, ticket, head, url_version)
            if pending is not None and rows.give(request, pending):
                pending.ticket = request
            else:
                self.core.cancel(request)
                if pending is not None:
                    self.forget(pending)
        # The sweep looks from the oldest on, and stops at the first that is young enough.
        self.in_flight.update(before)

    # --- the engine calls these -----------------------------------------------------------------------------------

    def watch_rows(self) -> None:
        """There is a request whose limits have to be looked after."""
        self._sweep.start(self)

    def adopt(self, link: CallLink, ticket: int, head: bytes, url_version: str) -> Pending | None:
        """The request that came with ``head``, among those in flight; None if no front end sends such a head."""
        exchange = link.adopt(ticket, head)
        if exchange is None:
            return None
        kind = KeptOutput if exchange.keeps_output else Pending
        pending = kind(self, exchange, self.version, url_version)
        pending.stage = SUBMITTED
        pending.ticket = NO_TICKET
        pending.is_raw = kind is Pending and self._takes_raw(exchange.request)
        exchange.on_disconnect = pending.cancel
        self.in_flight[pending] = None
        self.idle.clear()
        return pending

    def _takes_raw(self, request: Request) -> bool:
        """Whether a request is answered with its row's bytes."""
        return self._raw is not None and self._raw.takes(request)

    # --- what becomes of them -------------------------------------------------------------------------------------

    def keep_outputs(self, owners: list[Pending | None], completion: Any) -> list[Pending | None]:
        """Has endpoints answer those requests of a batch that only they have the words for; returns the others."""
        rest = list(owners)
        for index, owner in enumerate(owners):
            if not isinstance(owner, KeptOutput):
                continue
            rest[index] = None
            if owner.stage == OVER:
                continue
            owner.came(completion, index)
            try:
                owner.exchange.keep(owner)
            except Exception:
                log.exception("delivering an output failed")
                self.answer_error(owner, ServerError("Internal error"))
        return rest

    def answer_kept(self, pending: Pending) -> bool:
        """Answers a request with what its model has made of it already; False if that was used."""
        batch = pending.kept.take(pending)
        if batch is None:
            return False
        pending.stage = SUBMITTED
        pending.ticket = NO_TICKET
        pending.started_at = batch.started_at
        pending.is_raw = pending.inputs is None and self._takes_raw(pending.exchange.request)
        try:
            self.answer_run(batch.owners, batch)
        except Exception:
            log.exception("delivering an output failed")
            self.fail_batch(batch.owners)
        return True

    def answer_run(self, owners: list[Pending | None], completion: Any) -> None:
        """Answers a batch that has run: row i of its output goes to owner i."""
        raise NotImplementedError

    def rows_answered(self, completion: Any) -> None:
        """A batch had some of these requests; the engine has answered them as far as it could."""
        self.finished_at = completion.finished_at
        for url_version, *counts in completion.row_counts:
            self.recorder(url_version).observe_many(*counts)
        if completion.row_arrived_at and not any(completion.owners):  # else it was noted with its other requests
            self._batch_recorder.note(completion, completion.row_arrived_at, self.batch_size_max)
        if not self.in_flight_count:
            self.idle.set()

    def row_cancelled(self, url_version: str) -> None:
        """The client of one has hung up."""
        self.services.metrics.observe_abort(self.name, self.version, url_version)
        if not self.in_flight_count:
            self.idle.set()
