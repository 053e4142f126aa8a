"""What became of each request, as its client saw it. The ledger is the oracle, never the server's own metrics."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

RIGHT = "right"
OTHER_VERSION = "other version"
"""Right, but of a version that is not the default at the time; only a deploy may bring it."""
REFUSED = "refused"
"""A whole answer, with an error's status."""
LOST = "lost"
"""The connection ended before any byte of an answer."""
CUT = "cut"
"""The connection ended within an answer."""
HUNG = "hung"
"""No answer within the client's time limit."""
WRONG, SWAPPED, DOUBLED = "wrong", "swapped", "doubled"
"""Not what was asked for; the right answer of another request; bytes on the connection that nobody asked for."""
UNREACHABLE = "unreachable"
"""No connection could be made: the request was never sent."""

NEVER = frozenset({WRONG, SWAPPED, DOUBLED, HUNG})
"""No fault excuses these."""

_REMEMBERED_MAX = 20_000


@dataclass
class Record:
    """One request that was not simply answered right.

    Attributes:
        sent_at, ended_at: seconds of the monotonic clock.
        status: of the answer; 0 without one.
        detail: what the client saw, shortened.
    """

    id: str
    kind: str
    model: str
    sent_at: float
    ended_at: float
    outcome: str
    status: int = 0
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Cost:
    """What a fault may cost: requests of ``models`` may end as ``outcome``, with one of ``statuses``.

    Attributes:
        kinds: only those whose name begins so.
        models, statuses: empty for any.
        lasts_s: also so many seconds after the recovery.
    """

    outcome: str
    models: tuple[str, ...] = ()
    statuses: tuple[int, ...] = ()
    kinds: str = ""
    lasts_s: float = 0.0

    def covers(self, record: Record) -> bool:
        return (
            record.outcome == self.outcome
            and record.kind.startswith(self.kinds)
            and (not self.models or record.model in self.models)
            and (not self.statuses or record.status in self.statuses)
        )


@dataclass
class Window:
    """From the moment a fault begins until everything is as before."""

    step: int
    fault: str
    costs: tuple[Cost, ...]
    begun_at: float
    over_at: float = float("inf")

    def excuses(self, record: Record) -> bool:
        if record.outcome in NEVER or record.ended_at < self.begun_at:
            return False
        return any(cost.covers(record) and record.sent_at <= self.over_at + cost.lasts_s for cost in self.costs)


@dataclass
class Ledger:
    """All windows and all records that are not right."""

    windows: list[Window] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    def unexcused(self) -> list[Record]:
        """The records that no fault explains; each is a violation."""
        return [record for record in self.records if not any(window.excuses(record) for window in self.windows)]

    def counts(self) -> Counter[str]:
        return Counter(record.outcome for record in self.records)

    def refused_by_status(self) -> Counter[int]:
        return Counter(record.status for record in self.records if record.outcome == REFUSED)


class Expectations:
    """The right answers of the latest requests of all clients, to say whose answer a wrong one is. Any thread."""

    def __init__(self) -> None:
        self._ids: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, id: str, answers: Iterable[bytes]) -> None:
        with self._lock:
            for answer in answers:
                self._ids[answer] = id
            while len(self._ids) > _REMEMBERED_MAX:
                self._ids.popitem(last=False)

    def name(self, answer: bytes, id: str) -> str:
        """WRONG, or SWAPPED if it is the right answer of another request."""
        with self._lock:
            other = self._ids.get(answer, id)
        return SWAPPED if other != id else WRONG
