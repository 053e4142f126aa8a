"""Whether health tells the truth: a prober asks every 20 ms, and what it heard is held against what was done.

Three kinds of lies, each as long as it lasted:

- a worker that was killed is still shown as ready,
- ``/ping`` is healthy while a model has lost its last worker and no other has come,
- ``/ping`` or ``/ready`` complains although every model answers right: after the recovery, or during a fault that
  takes nothing from anybody.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

from tests.chaos.fault import Death
from tests.chaos.http_client import Failure, HttpClient

INTERVAL_S = 0.02
_LIMIT_S = 10.0


class Probe(NamedTuple):
    """What was heard.

    Attributes:
        asked_at, heard_at: of the monotonic clock.
        what: ``/ping``, ``/ready``, or the name of a model that was described.
        is_well: status 200.
        ready_pids: of the described model.
    """

    asked_at: float
    heard_at: float
    what: str
    is_well: bool
    ready_pids: frozenset[int] = frozenset()


class Prober:
    """Asks in threads of its own; a context."""

    def __init__(self, inference: tuple[str, int], management: tuple[str, int], models: Iterable[str], *, is_tls: bool):
        self._is_over = threading.Event()
        self._probes: list[Probe] = []
        self._lock = threading.Lock()
        described = [(management, f"/models/{model}", model) for model in models]
        self._threads = [
            threading.Thread(target=self._ask, args=(HttpClient(inference, is_tls=is_tls, limit_s=_LIMIT_S),
                                                     [("/ping", "/ping"), ("/ready", "/ready")])),
            threading.Thread(target=self._ask, args=(HttpClient(management, is_tls=is_tls, limit_s=_LIMIT_S),
                                                     [(path, model) for _, path, model in described])),
        ]  # fmt: skip

    def __enter__(self) -> Prober:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def take(self) -> list[Probe]:
        """All since the last time, in order of asking."""
        with self._lock:
            taken, self._probes = self._probes, []
        return sorted(taken)

    def _ask(self, client: HttpClient, asked: list[tuple[str, str]]) -> None:
        while not self._is_over.wait(INTERVAL_S):
            for path, what in asked:
                asked_at = time.monotonic()
                try:
                    reply = client.ask("GET", path)
                except Failure:
                    continue  # silence is no lie; `longest_silence` measures it
                pids: frozenset[int] = frozenset()
                if what not in ("/ping", "/ready") and reply.status == 200:
                    rows = json.loads(reply.body)[0]["workers"]
                    pids = frozenset(row["pid"] for row in rows if row["status"] == "READY")
                with self._lock:
                    self._probes.append(Probe(asked_at, time.monotonic(), what, reply.status == 200, pids))
        client.close()


class Lie(NamedTuple):
    seconds: float
    what: str


def lies(
    probes: list[Probe], deaths: Iterable[Death], *, begun_at: float, well_from: float, is_harmless: bool
) -> list[Lie]:
    """What was said that was not so.

    Args:
        probes: of one step, from before it began until after its recovery, in order.
        well_from: since when every model answers right again.
    """
    found = [lie for death in deaths for lie in (_shown_ready(probes, death), _healthy_without(probes, death)) if lie]
    calm_from = begun_at if is_harmless else well_from
    for what in ("/ping", "/ready"):
        ill = _longest([p for p in probes if p.what == what], calm_from, lambda probe: not probe.is_well)
        if ill:
            found.append(Lie(ill, f"{what} complains though every model answers"))
    return found


def _shown_ready(probes: list[Probe], death: Death) -> Lie | None:
    last = max((p.asked_at for p in probes if p.what == death.model and death.pid in p.ready_pids), default=0.0)
    return Lie(last - death.at, f"{death.model}'s killed worker is shown as ready") if last > death.at else None


def _healthy_without(probes: list[Probe], death: Death) -> Lie | None:
    """Until ``/ping`` complains, or the model has another worker."""
    if not death.was_last:
        return None
    dead = {death.pid}
    until = min(
        [p.asked_at for p in probes if p.asked_at > death.at and p.what == "/ping" and not p.is_well]
        + [p.asked_at for p in probes if p.asked_at > death.at and p.what == death.model and p.ready_pids - dead],
        default=float("inf"),
    )
    last = max((p.asked_at for p in probes if p.what == "/ping" and p.is_well and death.at < p.asked_at < until),
               default=0.0)  # fmt: skip
    return Lie(last - death.at, f"/ping is healthy though {death.model} has no worker") if last else None


def _longest(probes: list[Probe], start: float, is_lie: Callable[[Probe], bool]) -> float:
    """The longest run of lies among what was asked since ``start``; at least a probe's interval if there is one."""
    longest, since = 0.0, None
    for probe in probes:
        if probe.asked_at < start:
            continue
        if is_lie(probe):
            since = probe.asked_at if since is None else since
            longest = max(longest, probe.heard_at - since)
        else:
            since = None
    return longest


def longest_silence(probes: list[Probe], begun_at: float) -> float:
    """The longest time without an answer of ``/ping`` since ``begun_at``, beyond the pause between two questions."""
    heard = [begun_at, *(p.heard_at for p in probes if p.what == "/ping" and p.heard_at > begun_at)]
    return max((later - earlier - INTERVAL_S for earlier, later in pairwise(heard)), default=0.0)
