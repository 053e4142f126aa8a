"""A request on its way through a lane: from admission to its one answer."""

from __future__ import annotations

import time
from typing import Any

from pyserve.http1_exchange import Exchange

PREPARING, SUBMITTED, OVER = range(3)


class Pending:
    """One admitted request. Loop thread only, but for ``exchange.request`` being read while preprocessing.

    Attributes:
        lane: what it runs on; has ``complete`` and ``expire``.
        version: the model's.
        url_version: the version as in the URL, ``default`` if it named none.
        ticket: the engine's, once submitted.
        stage: PREPARING, SUBMITTED or OVER. It moves forward only, and only the move to OVER answers.
        started_at: ns; when its batch began to run; 0 until its completion tells.
    """

    __slots__ = ("exchange", "lane", "stage", "started_at", "ticket", "url_version", "version")

    def __init__(self, lane: Any, exchange: Exchange, version: str, url_version: str):
        self.lane = lane
        self.exchange = exchange
        self.version = version
        self.url_version = url_version
        self.ticket = 0
        self.stage = PREPARING
        self.started_at = 0

    @property
    def arrived_at(self) -> int:
        return self.exchange.request.arrived_at

    def queue_s(self) -> float:
        """From arrival until a worker took it; 0 if none did."""
        return (self.started_at - self.arrived_at) / 1e9 if self.started_at else 0.0

    def age_s(self) -> float:
        return (time.monotonic_ns() - self.arrived_at) / 1e9
