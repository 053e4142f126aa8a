"""Recovered: every kind of request is answered right, health says so, and the same is served as before."""

from __future__ import annotations

import http.client
import time
from typing import Any

from tests.chaos import ledger
from tests.chaos.ledger import Expectations
from tests.chaos.site import Site
from tests.chaos.traffic import Asking

_LOOK_S = 0.02
_WAITED_S = 0.3
"""An answer that took longer was waited for: what had to come back was not there yet."""


class Recovery:
    """The canaries: one request of each kind, on connections of their own.

    Args:
        limit_s: how long `wait` waits.

    Attributes:
        rows: what is to be served; empty for whatever is.
        gone: processes that were killed; they must not be shown any more.
        well_from: all that was asked since then was answered right and without waiting, if `wait` found nothing wrong.
    """

    def __init__(self, site: Site, limit_s: float):
        self._site = site
        self._limit_s = limit_s
        self._canaries: list[Asking] = [make() for make in site.target.askers(Expectations())]
        self._count = 0
        self.gone: set[int] = set()
        self.rows: dict[str, Any] = {}
        self.well_from = self._asked_at = 0.0

    def close(self) -> None:
        for canary in self._canaries:
            canary.close()

    def wait(self) -> str:
        """Returns what is still wrong when the time is over; empty as soon as nothing is. An init system is at work."""
        deadline = time.monotonic() + self._limit_s
        while True:
            self._site.keep()
            self.well_from = self._asked_at = time.monotonic()
            problem = self._problem()
            if not problem or time.monotonic() > deadline:
                return problem
            time.sleep(_LOOK_S)

    def _note_wait(self) -> None:
        now = time.monotonic()
        if now - self._asked_at > _WAITED_S:
            self.well_from = now
        self._asked_at = now

    def _problem(self) -> str:
        """The first that is not as it should be."""
        for canary in self._canaries:
            self._count += 1
            seen = canary.ask(f"canary-{self._count}")
            self._note_wait()
            if seen.outcome != ledger.RIGHT:
                return f"{canary.name}: {seen.outcome} {seen.status} {seen.detail[:500]}"
        try:
            for path in ("/ping", "/ready"):
                answer = self._site.ask("GET", path)
                self._note_wait()
                if answer.status != 200:
                    return f"{path}: {answer.status} {answer.body[:500]!r}"
            rows = self._site.rows()
            self._note_wait()
        except (OSError, http.client.HTTPException, AssertionError, ValueError) as error:
            return f"health or management: {error!r}"
        if self.rows and rows != self.rows:
            changed = {name: (self.rows.get(name), rows.get(name)) for name in self.rows.keys() | rows.keys()
                       if self.rows.get(name) != rows.get(name)}  # fmt: skip
            return f"served otherwise than before (before, now): {changed}"
        if self.gone & self._site.shown_pids:
            return f"a killed worker is still shown: {sorted(self.gone & self._site.shown_pids)}"
        return ""
