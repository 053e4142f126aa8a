"""A request whose model ran for the engine alone, and whose answer has words that only endpoints know.

    engine ──output, no native answer──> KeptOutput ──Exchange.keep──> the request's own endpoint
                                                                              │ parses it, makes a Pending
      answer <── what the lane does with any batch <── KeptBatch <── lane.predict, which submits nothing

So each request runs once, and is counted once, by who answers it.

Loop thread only.
"""

from __future__ import annotations

from typing import Any

import torch

from pyserve.handlers.tensor_spec import raw_bytes
from pyserve.lanes.pending import OVER, Pending
from pyserve.request.exchange import Exchange

# Of no request: what was given back already cannot be cancelled.
NO_TICKET = (1 << 64) - 1


class KeptOutput(Pending):
    """Such a request until an endpoint has it: counted if it fails, expires or is cancelled before, else not."""

    __slots__ = ("_completion", "_index")

    def __init__(self, lane: Any, exchange: Exchange, version: str, url_version: str):
        super().__init__(lane, exchange, version, url_version)
        self._completion: Any = None
        self._index = 0

    def came(self, completion: Any, index: int) -> None:
        """Its model has run: its row is this one of the batch."""
        self._completion, self._index = completion, index

    def began_at(self) -> int:
        """As of every request; once it has run, since then: who is to come for it has as long as a run may take."""
        return super().began_at() if self._completion is None else int(self._completion.started_at)

    def let_go(self) -> None:
        """It is somebody else's, or nobody's, from here on."""
        if self.stage != OVER:
            self.lane.forget(self)

    def take(self, pending: Pending) -> KeptBatch | None:
        """The output, for ``pending`` to be answered with; None if it was taken already."""
        completion, self._completion = self._completion, None
        return None if completion is None else KeptBatch(completion, self._index, pending)


def model_that_ran(exchange: Exchange) -> Any:
    """The model that has run for a request already, whatever became of its name since; None of almost all."""
    kept: KeptOutput | None = exchange.kept
    return None if kept is None else kept.lane.served_as()


class KeptBatch:
    """A batch that has ended as ``_core.Completion`` has it, of which one request is left.

    Args:
        index: the request's place in it.
    """

    code = "ok"
    finished = None

    def __init__(self, completion: Any, index: int, pending: Pending):
        self.started_at: int = completion.started_at
        self.staged_at: int = completion.staged_at
        self.finished_at: int = completion.finished_at
        self.batch_size: int = completion.batch_size
        count = len(completion.owners)
        output = completion.output
        if isinstance(output, torch.Tensor) and output.dim() and len(output) == count:
            # Alone, or each of many would have all of the batch looked at.
            self.output = output[index : index + 1]
            self.owners: list[Pending | None] = [pending]
        else:
            self.output = output
            self.owners = [pending if place == index else None for place in range(count)]
        stamp = pending.arrived_at, pending.arrived_at
        self.stamps = [stamp if owner is not None else None for owner in self.owners]

    def rows(self) -> list[bytes] | None:
        """Its row's bytes; None if the output is not one tensor with a row for each request."""
        output = self.output
        is_row = isinstance(output, torch.Tensor) and output.dim() and len(output) == len(self.owners) == 1
        return [raw_bytes(output)] if is_row else None
