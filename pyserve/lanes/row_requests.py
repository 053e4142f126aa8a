"""A request of several rows: each goes through a lane as a request of its own, and the answers make one answer.

    RowsPending ──> read ──> row by row into the lane ──> answers, in any order ──> one answer
    (admitted once) (rows)   (RowPending, a few at once)   (kept by row)

The whole is admitted once and answered once; its rows are batched with whatever else the lane has. The first row that
fails decides: the whole fails with its error, and what has not run yet does not run. A whole of one row whose `inputs`
are the network's own goes through the lane itself, without a row.

Loop thread only, but for `read` and `make_answer`.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from pyserve.errors import BadRequestError, OutOfMemoryError, ServeError, ServerError, is_memory_error
from pyserve.full_collections import put_off_during
from pyserve.lanes.engine_lane import EngineLane
from pyserve.lanes.lane import Lane
from pyserve.lanes.pending import OVER, SUBMITTED, Pending
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request, Response

log = logging.getLogger(__name__)

T = TypeVar("T")

ROW_COUNT_MAX = 65536
# Rows of one request that are in the lane at once; more when its workers take more.
ROWS_AT_ONCE_MIN = 16


class RowPending(Pending):
    """One row.

    Attributes:
        index: of the row.
        inputs: what the network gets; None to have the handler make it of the body.
        wants_tensors: whether the whole takes the network's output, not the handler's answer.
    """

    __slots__ = ("index", "inputs", "wants_tensors", "whole")

    def __init__(
        self, whole: RowsPending, index: int, request: Request, inputs: list[torch.Tensor] | None, *,
        wants_tensors: bool = False,
    ):  # fmt: skip
        # The exchange knows the whole and not the row: of two that know each other the memory, the body's with it,
        # would come back only with a garbage collection.
        super().__init__(whole.lane, Exchange(request, whole.row_answered), whole.version, whole.url_version)
        self.stages = None  # it is the whole whose time is told
        self.whole = whole
        self.index = index
        # The first have waited as long as the whole; later ones begin to wait when it is their turn.
        self.arrived_at = whole.arrived_at if index < ROWS_AT_ONCE_MIN else time.monotonic_ns()
        self.inputs = inputs
        self.wants_tensors = wants_tensors

    @property
    def kept(self) -> Any:
        """That of the whole, of which it is all."""
        return self.whole.exchange.kept if self.whole.row_count == 1 else None

    def observe(self, status: int | None) -> None:
        """It is the whole that is counted."""


class RowsPending(Pending):
    """The whole; subclasses say what its rows are.

    Attributes:
        row_count: known once `read` has returned.
        inputs: what the network gets, [rows, ...] each, if `read` has made that of the request; else None.
        index: of the first of its rows.
        output_names: what model-config.yaml calls the network's outputs.
    """

    __slots__ = ("_has_begun", "_left", "_next", "_rows", "row_count")
    index = 0
    output_names: tuple[str, ...] = ()

    def __init__(self, lane: Lane, exchange: Exchange, version: str, url_version: str):
        super().__init__(lane, exchange, version, url_version)
        self.row_count = 0
        self._has_begun = False
        self._next = 0
        self._left = 0
        self._rows: dict[Exchange, RowPending] = {}  # in the lane

    # --- for subclasses -------------------------------------------------------------------------------------------

    @property
    def is_quick(self) -> bool:
        """Whether `read` takes under 50 us and may run on the loop."""
        raise NotImplementedError

    def read(self) -> int:
        """The number of rows, after checking all that can be checked of them. Any thread; raises ServeError."""
        raise NotImplementedError

    def row(self, index: int) -> RowPending:
        """A row for the lane."""
        raise NotImplementedError

    def take_tensors(self, first: int, outputs: list[torch.Tensor], names: tuple[str, ...]) -> None:
        """The network's outputs for rows ``first``, ``first + 1``, ... Raises ServeError if they cannot be used."""
        raise NotImplementedError

    def take_answer(self, index: int, response: Response) -> None:
        """The handler's answer for a row."""
        raise NotImplementedError

    @property
    def is_answer_quick(self) -> bool:
        """Whether `make_answer` may run on the loop."""
        raise NotImplementedError

    def make_answer(self) -> Response:
        """The one answer, from those of all rows. Any thread; raises ServeError."""
        raise NotImplementedError

    # --- its way --------------------------------------------------------------------------------------------------

    @property
    def whole(self) -> RowsPending:
        """Itself, where it stands among rows as its own one."""
        return self

    @property
    def is_swept(self) -> bool:
        """Its own time limit is that of reading it, and of running if it is one row; else its rows have theirs."""
        return not self._has_begun or (self.stage == SUBMITTED and not self.started_at)

    @property
    def was_submitted(self) -> bool:
        """Its rows are, one by one."""
        return self._has_begun

    def began_at(self) -> int:
        """When the first of its rows began, ns; 0 while all wait."""
        if self.stage == SUBMITTED:
            return self.started_at or super().began_at()
        began = (row.began_at() for row in self._rows.values())
        return self.started_at or min((at for at in began if at > 0), default=0)

    def begin(self) -> None:
        """Called by the lane once it is admitted."""
        if self.is_quick:
            self._begin_rows(_outcome(self.read))
        else:
            self.lane.in_pool(lambda: put_off_during(lambda: _outcome(self.read)), self._begin_rows, waits=True)

    def _begin_rows(self, count: int | ServeError) -> None:
        if self.stage == OVER:
            return
        if not isinstance(count, ServeError) and not 0 < count <= ROW_COUNT_MAX:
            count = BadRequestError(
                f"a request holds 1 to {ROW_COUNT_MAX} rows, got {count}" + ("; split it" if count else "")
            )
        if isinstance(count, ServeError):
            self.fail(count)
            return
        self._has_begun = True
        self.row_count = self._left = count
        if count == 1 and self.inputs is not None:
            super().begin()
        else:
            self._feed()

    def _feed(self) -> None:
        """Brings rows into the lane, as many as its workers will want soon."""
        lane: EngineLane = self.lane
        at_once = max(ROWS_AT_ONCE_MIN, 2 * lane.settings.batch_size * max(1, lane.ready_count))
        while self._next < self.row_count and len(self._rows) < at_once and self.stage != OVER:
            if self._rows and not lane.has_room_in_ring:
                return
            row = self.row(self._next)
            self._next += 1
            self._rows[row.exchange] = row
            lane.take_row(row)

    def tensors_came(
        self, rows: Sequence[Row], started_at: int, outputs: list[torch.Tensor], names: tuple[str, ...]
    ) -> None:
        """Rows that follow one another have run; entry i of each output is that of row i of ``rows``."""
        if self.stage == OVER:
            return
        self._count(rows, started_at)
        self._take(lambda: self.take_tensors(rows[0].index, outputs, names))

    def row_answered(self, exchange: Exchange) -> None:
        """The lane has answered one: with the handler's answer, or with an error."""
        if exchange.is_streaming and not exchange.is_ended:
            return  # all parts of a streamed answer together are the row's
        response, row = exchange.response, self._rows.get(exchange)
        if self.stage == OVER or response is None or row is None:
            return
        self._count([row], row.started_at)
        if response.error is not None:
            self.fail(self._error_of(row, response.error))
            return
        if exchange.is_streaming:
            response.body = b"".join(exchange.parts)
        if exchange.is_aborted or response.status >= 400:
            self._end(response)
            return
        self._take(lambda: self.take_answer(row.index, response))

    def _take(self, keep: Callable[[], None]) -> None:
        failure = _outcome(keep)
        if failure is None:
            self._advance()
        else:
            self.fail(failure)

    def _count(self, rows: Sequence[Row], started_at: int) -> None:
        for row in rows:
            self._rows.pop(row.exchange, None)
        self._left -= len(rows)
        if started_at and not self.started_at:
            self.started_at = started_at

    def _error_of(self, row: RowPending, error: ServeError) -> ServeError:
        if self.row_count == 1:
            return error
        told = copy.copy(error)  # the lane may tell it to others too
        told.detail = {"row": row.index, **error.detail}
        return told

    def _advance(self) -> None:
        if self._left:
            self._feed()
        elif self.is_answer_quick:
            self._answered(_outcome(self.make_answer))
        else:
            self.lane.in_pool(lambda: put_off_during(lambda: _outcome(self.make_answer)), self._answered, waits=False)

    def _answered(self, answer: Response | ServeError) -> None:
        if isinstance(answer, ServeError):
            self.fail(answer)
        else:
            self._end(answer)

    def fail(self, error: ServeError) -> None:
        """Answers with ``error``; rows that have not run do not run."""
        self.lane.answer_error(self, error)
        self.drop()

    def _end(self, response: Response) -> None:
        self.lane.answer(self, response)
        self.drop()

    def drop(self) -> None:
        """Its rows do not run."""
        super().drop()
        rows, self._rows = self._rows, {}
        for row in rows.values():
            row.cancel()


# What takes the network's output: a row, or a whole of one.
Row = RowPending | RowsPending


def _outcome(call: Callable[[], T]) -> T | ServeError:
    """What ``call`` returns, or why it does not."""
    try:
        return call()
    except ServeError as error:
        return error
    except Exception as error:
        if is_memory_error(error):
            return OutOfMemoryError("Out of resources", detail={"exception": type(error).__name__})
        log.exception("a request of several rows failed")
        return ServerError("Internal error")


def runs_of_rows(owners: list[Pending | None]) -> list[tuple[int, list[Row]]]:
    """Places in the batch where rows begin that follow one another in their request too: often all of it is one."""
    runs: list[tuple[int, list[Row]]] = []
    for place, owner in enumerate(owners):
        if not isinstance(owner, Row) or not owner.wants_tensors:
            continue
        if runs:
            first, rows = runs[-1]
            if first + len(rows) == place and rows[0].whole is owner.whole and rows[-1].index + 1 == owner.index:
                rows.append(owner)
                continue
        runs.append((place, [owner]))
    return runs
