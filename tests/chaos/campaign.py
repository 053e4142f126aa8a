"""A campaign: traffic, faults one after the other, and the judgement of what was answered meanwhile."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos import clock_library, models
from tests.chaos.fault import ALL_DOWN, Fault
from tests.chaos.faults import ALL
from tests.chaos.health import Prober, lies, longest_silence
from tests.chaos.leaks import left_behind, settled
from tests.chaos.ledger import Ledger, Record, Window
from tests.chaos.plan import Step, make_plan
from tests.chaos.recovery import Recovery
from tests.chaos.report import Report
from tests.chaos.site import Site, serving
from tests.chaos.traffic import Traffic

HOLD_LIMIT_S = 2.0
"""A fault that keeps all clients waiting is taken back after this."""
CALM_S = 0.06
"""After each recovery; health is still listened to."""
_STALL_LIMIT_S = 60.0
_WARMING = ("deploy", "scale", "register-again", "register-broken")
_RECORDS_SHOWN_MAX = 5


@dataclass(frozen=True)
class Order:
    """What a campaign is to be.

    Attributes:
        requests, faults: how many faults are spread over how many requests.
        classes: of faults.
        rate: requests a second of all clients together, at most; clients: of each kind.
        warm_up: requests before what is held is measured.
        recovery_limit_s: a fault that is not forgiven by then is a violation.
        memory_growth: how much resident memory may have grown in the end, as a share of what it was.
        log: gets a line for each step.
    """

    seed: int
    requests: int
    faults: int
    classes: tuple[str, ...]
    rate: float
    clients: int
    warm_up: int
    recovery_limit_s: float
    memory_growth: float
    is_tls: bool
    log: Path


class Campaign:
    """One campaign on a site that runs."""

    def __init__(self, site: Site, order: Order, report: Report, traffic: Traffic, ledger: Ledger):
        self._site = site
        self._report = report
        self._traffic = traffic
        self._ledger = ledger
        self._order = order
        self._recovery = Recovery(site, order.recovery_limit_s)
        self._judged = 0

    def run(self, plan: list[Step]) -> None:
        problem = self._recovery.wait()
        if problem:
            self._report.violate(f"before the first fault: {problem}")
            return
        self._recovery.rows = self._site.rows()
        self._warm()
        before = settled(self._site)
        self._traffic.resume()
        started = self._traffic.sent
        target = self._site.target
        management = self._site.address("management")
        with Prober(target.http, management, ("echo", "streamer", "adder"), is_tls=target.is_tls) as prober:
            for step in plan:
                self._traffic.wait_sent(started + step.at, _STALL_LIMIT_S)
                if not self._play(step, prober):
                    break
            else:
                self._traffic.wait_sent(started + self._order.requests, self._order.requests)
        self._traffic.pause()
        self._warm()  # the server may be another one now
        for line in left_behind(self._site, before, self._order.memory_growth):
            self._report.violate(f"left behind: {line}")
        self._judge(None)

    def _warm(self) -> None:
        """Requests without a fault, then changes, which have garbage collected; all connections are closed."""
        sent = self._traffic.sent
        self._traffic.resume()
        self._traffic.wait_sent(sent + self._order.warm_up, _STALL_LIMIT_S)
        self._traffic.pause()
        for name in _WARMING:
            self._change(name)
        self._recovery.close()

    def _change(self, name: str) -> None:
        """One change and back, without traffic, so that what is kept of it is there before it is measured."""
        fault = ALL[name](self._site, random.Random(0))
        fault.prepare()
        fault.inject()
        fault.heal()

    def _play(self, step: Step, prober: Prober) -> bool:
        """One fault from its beginning to its recovery; False when the campaign cannot continue."""
        fault = ALL[step.fault](self._site, random.Random(step.seed))
        fault.prepare()
        window = Window(step.number, step.fault, fault.costs, time.monotonic())
        self._ledger.windows.append(window)
        prober.take()
        sent = self._traffic.sent
        error = self._act(fault.inject)
        if fault.lasts:
            self._traffic.wait_sent(sent + step.hold, HOLD_LIMIT_S)
            error = self._act(fault.heal) or error
        healed_at = time.monotonic()
        self._recovery.gone = {death.pid for death in fault.deaths}
        problem = self._recovery.wait()
        window.over_at = time.monotonic()
        time.sleep(CALM_S)
        self._note(step, fault, prober, window, healed_at)
        where = f"step {step.number} ({step.fault}{': ' if fault.provokes else ''}{fault.provokes})"
        if error:
            self._report.violate(f"{where}: {error}")
        if problem:
            self._report.violate(f"{where}: not recovered: {problem}\n{self._tail()}")
        self._judge(where)
        return not problem or self._repair(where, window)

    def _repair(self, where: str, window: Window) -> bool:
        """What an operator would do: the server is stopped and started again, as it was in the beginning."""
        window.costs += ALL_DOWN
        window.over_at = float("inf")
        self._site.start_over()
        problem = self._recovery.wait()
        window.over_at = time.monotonic()
        if problem:
            self._report.violate(f"{where}: not even recovered by a restart: {problem}\n{self._tail()}")
        return not problem

    @staticmethod
    def _act(action: object) -> str:
        """What went wrong while the fault was begun or taken back."""
        assert callable(action)
        try:
            action()
        except Exception as error:
            return f"{error!r}"
        return ""

    def _note(self, step: Step, fault: Fault, prober: Prober, window: Window, healed_at: float) -> None:
        probes = prober.take()
        told = max(lies(probes, fault.deaths, begun_at=window.begun_at, well_from=window.over_at,
                        is_harmless=fault.is_harmless), default=None)  # fmt: skip
        entry = self._report.of(step.fault)
        recovery_s = max(0.0, self._recovery.well_from - healed_at)
        entry.count += 1
        entry.recoveries_s.append(round(recovery_s, 3))
        if recovery_s > entry.slowest_recovery_s:
            entry.slowest_recovery_s, entry.slowest_step = recovery_s, step.number
        if told is not None and told.seconds > entry.longest_lie_s:
            entry.longest_lie_s, entry.longest_lie = told
        entry.longest_silence_s = max(entry.longest_silence_s, longest_silence(probes, window.begun_at))
        with open(self._order.log, "a") as log:
            lie = f", {told.what} for {told.seconds * 1000:.0f} ms" if told else ""
            log.write(f"{window.begun_at:.3f} step {step.number} after {self._traffic.sent} requests: {step.fault} "
                      f"{fault.provokes}; recovered in {recovery_s:.2f} s{lie}; {self._resident()}\n")  # fmt: skip

    def _resident(self) -> str:
        """The server's memory, so that the log shows which fault it grows with."""
        try:
            process = self._site.process
            return f"server {process.pid} has {process.memory_info().rss >> 20} MB"
        except (LookupError, psutil.Error):
            return "no server"

    def _judge(self, where: str | None) -> None:
        """Reports what no fault explains, of all that was recorded since the last time."""
        unexcused = self._ledger.unexcused()
        fresh = unexcused[self._judged :]
        self._judged = len(unexcused)
        for record in fresh[:_RECORDS_SHOWN_MAX]:
            self._report.violate(f"{where or 'the end'}: {_line(record)}\n{self._tail()}")
        if len(fresh) > _RECORDS_SHOWN_MAX:
            self._report.violate(f"{where or 'the end'}: and {len(fresh) - _RECORDS_SHOWN_MAX} more of this kind")

    def _tail(self) -> str:
        return "\n".join(f"    | {line}" for line in self._site.log_tail())


def _line(record: Record) -> str:
    took = record.ended_at - record.sent_at
    return (
        f"{record.kind} request {record.id} is {record.outcome} ({record.status}) after {took:.3f} s: {record.detail}"
    )


def run(order: Order, report: Report, folder: Path) -> None:
    """Serves, plays, judges; everything goes into ``report``."""
    ledger = Ledger()
    begun_at = time.monotonic()
    lock = threading.Lock()

    def record(seen: Record) -> None:
        with lock:
            ledger.records.append(seen)

    with serving(folder, is_tls=order.is_tls, prepare=_prepare) as site:
        report.start_s = time.monotonic() - begun_at
        weights = {}
        for name in order.classes:
            reason = ALL[name].left_out(site)
            if reason:
                report.left_out[name] = reason
            else:
                weights[name] = ALL[name].weight
        plan = make_plan(order.seed, requests=order.requests, faults=order.faults, weights=weights)
        with Traffic(site.target, rate=order.rate, clients=order.clients, on_record=record) as traffic:
            try:
                Campaign(site, order, report, traffic, ledger).run(plan)
            finally:
                report.sent, report.right = traffic.sent, traffic.right
                report.outcomes, report.refused = ledger.counts(), ledger.refused_by_status()
                report.seconds = time.monotonic() - begun_at


def _prepare(site: Site) -> None:
    clock_library.load(site)
    models.write_archives(site.store)
