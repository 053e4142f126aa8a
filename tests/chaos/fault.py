"""What every fault is: how it begins, how it is taken back, and what it may cost."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from tests.chaos import ledger
from tests.chaos.ledger import Cost
from tests.chaos.site import Site, kill

PYTHON_MODELS = ("echo", "streamer", "adder")
SEQUENCE_MODEL = "adder"

# The next request of a sequence whose worker ended is told so, whenever it comes.
_SEQUENCE_ENDED = Cost(ledger.REFUSED, (SEQUENCE_MODEL,), (409,), lasts_s=5.0)
SERVER_DOWN = (
    Cost(ledger.LOST),
    Cost(ledger.CUT),
    Cost(ledger.UNREACHABLE, kinds="grpc"),  # gRPC's ports go with the server, the others stay open
    _SEQUENCE_ENDED,
)
ALL_DOWN = (*SERVER_DOWN, Cost(ledger.UNREACHABLE))


def worker_down(*models: str) -> tuple[Cost, ...]:
    """What ran in the killed workers of these models, and nothing else."""
    return (Cost(ledger.REFUSED, models, (500,)), Cost(ledger.CUT, models), _SEQUENCE_ENDED)


class Death(NamedTuple):
    """A worker that was killed: at ``at`` of the monotonic clock; ``was_last`` when its model had no other."""

    pid: int
    model: str
    at: float
    was_last: bool


class Fault(ABC):
    """One fault, once.

    Args:
        chance: for all that it chooses.

    Attributes:
        name: of the class, as the command line has it; empty for classes that only others are made of.
        weight: how often it comes, beside the others.
        is_harmless: health must not change at all, since every model can answer all the time.
        costs: see `ledger.Cost`; known once it has begun.
        deaths: workers that it killed.
        provokes: what else was done meanwhile, for the report.
    """

    name: ClassVar[str] = ""
    weight: ClassVar[int] = 10
    is_harmless: ClassVar[bool] = False

    def __init__(self, site: Site, chance: random.Random):
        self.site = site
        self.chance = chance
        self.costs: tuple[Cost, ...] = ()
        self.deaths: list[Death] = []
        self.provokes = ""

    @property
    def lasts(self) -> bool:
        """Whether there is something to take back."""
        return type(self).heal is not Fault.heal

    @classmethod
    def left_out(cls, site: Site) -> str:
        """Why it cannot be had here; empty if it can."""
        return ""

    def prepare(self) -> None:
        """Chooses, and says what it may cost, before anything happens."""
        return

    @abstractmethod
    def inject(self) -> None:
        """Makes it happen."""

    def heal(self) -> None:
        """Takes it back; nothing to do where it happened once."""
        return

    def kill_workers(self, model: str, count: int = 1) -> None:
        """Kills so many ready workers of ``model``, and returns when they have ended."""
        pids = self.site.worker_pids(model)
        chosen = self.chance.sample(pids, min(count, len(pids)))
        self.note_deaths(model, chosen, len(chosen) == len(pids))
        kill(*chosen)

    def note_deaths(self, model: str, pids: list[int], were_last: bool) -> None:
        """REQUIRES: they are killed at once."""
        self.deaths += [Death(pid, model, time.monotonic(), were_last) for pid in pids]
