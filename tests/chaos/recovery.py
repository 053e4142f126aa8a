"""Recovered: every kind of request is answered right, health says so, and the same is served as before."""

from __future__ import annotations

import http.client
import time
from typing import Any

from tests.chaos import ledger
from tests.chaos.ledger import Expectations
from tests.chaos.site import Site
from tests.chaos.traffic import Asking

LIMIT_S = 70.0
"""Models whose workers ended too often in a minute wait for its end."""
_LOOK_S = 0.02


class Recovery:
    """The canaries: one request of each kind, on connections of their own.

    Attributes:
        rows: what is to be served; empty for whatever is.
        well_from: all that was asked since then was right, if `wait` found nothing wrong.
    """

    def __init__(self, site: Site):
        self._site = site
        self._canaries: list[Asking] = [make() for make in site.target.askers(Expectations())]
        self._count = 0
        self.rows: dict[str, Any] = {}
        self.well_from = 0.0

    def close(self) -> None:
        for canary in self._canaries:
            canary.close()

    def wait(self, limit_s: float = LIMIT_S) -> str:
        """Returns what is still wrong after ``limit_s``; empty as soon as nothing is. An init system is at work."""
        deadline = time.monotonic() + limit_s
        while True:
            self._site.keep()
            self.well_from = time.monotonic()
            problem = self._problem()
            if not problem or time.monotonic() > deadline:
                return problem
            time.sleep(_LOOK_S)

    def _problem(self) -> str:
        """The first that is not as it should be."""
        for canary in self._canaries:
            self._count += 1
            seen = canary.ask(f"canary-{self._count}")
            if seen.outcome != ledger.RIGHT:
                return f"{canary.name}: {seen.outcome} {seen.status} {seen.detail[:500]}"
        try:
            for path in ("/ping", "/ready"):
                answer = self._site.ask("GET", path)
                if answer.status != 200:
                    return f"{path}: {answer.status} {answer.body[:500]!r}"
            rows = self._site.rows()
        except (OSError, http.client.HTTPException, AssertionError, ValueError) as error:
            return f"health or management: {error!r}"
        if self.rows and rows != self.rows:
            changed = {name: (self.rows.get(name), rows.get(name)) for name in self.rows.keys() | rows.keys()
                       if self.rows.get(name) != rows.get(name)}  # fmt: skip
            return f"served otherwise than before (before, now): {changed}"
        return ""
