"""When requests are sent and how their ends are counted: closed and open loop, without any I/O.

*Closed loop*: ``concurrency`` clients, each sends its next request when the last one is answered.
*Open loop*: requests are due at times fixed beforehand (``rate``, constant or Poisson). A server that stalls does not
slow the schedule: requests due meanwhile wait for a connection, and their latency counts from the time they were due,
so the stall appears in the percentiles in full. (Measuring from the actual send instead would leave it out; Gil Tene
named that coordinated omission.)

Connections and the clock are passed in, so tests drive both by hand.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pyserve.load_test.recording import NEVER, NS_PER_S, Recording


class Wire(Protocol):
    """One connection with at most one request under way. The load owns the three marks."""

    intended: int
    sent_at: int
    is_busy: bool

    def send(self, payload: bytes) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send, and for how long. Times in ns; exactly one of ``requests`` and ``duration`` is set.

    Attributes:
        concurrency: clients of the closed loop; unused when ``rate`` is set.
        rate: requests per second of the open loop, ``None`` for the closed loop.
        arrivals: ``"constant"`` or ``"poisson"`` (exponential gaps), open loop only.
        phase: fraction of a gap by which the constant schedule starts later (several generator processes).
        warmup_requests, warmup: requests sent, or else time passed, before the measured window opens.
        timeout: longest time from sending a request to its complete answer.
        in_flight_max: most connections of the open loop.
        seed: of the Poisson gaps.
    """

    concurrency: int = 1
    rate: float | None = None
    arrivals: str = "constant"
    phase: float = 0.0
    requests: int | None = None
    duration: int | None = None
    warmup_requests: int = 0
    warmup: int = 0
    timeout: int = 60 * NS_PER_S
    in_flight_max: int = 512
    seed: int = 0


def due_times(plan: Plan, started_at: int) -> Iterator[int]:
    """The endless schedule of the open loop, in ns, in order. Computed from the start: errors do not add up."""
    if not plan.rate:
        raise ValueError("a schedule needs a rate above 0 requests/s")
    gap = NS_PER_S / plan.rate
    if plan.arrivals == "constant":
        number = plan.phase
        while True:
            yield started_at + int(number * gap)
            number += 1
    gaps = random.Random(plan.seed)
    at = 0.0
    while True:
        at += gaps.expovariate(1.0) * gap
        yield started_at + int(at)


class Load:
    """One generator: takes connections, sends payloads in turn, records the ends. Loop thread only.

    The driver calls ``start``, then ``connected``, ``answered``, ``failed``, ``lost`` and ``connect_failed`` as things
    happen, ``sweep`` every few dozen milliseconds and, in the open loop, ``on_due`` at ``next_due``.
    """

    def __init__(
        self,
        plan: Plan,
        payloads: list[bytes],
        recording: Recording,
        *,
        connect: Callable[[], None],
        now: Callable[[], int],
        on_done: Callable[[], None],
    ):
        self.plan = plan
        self.recording = recording
        self.is_done = False
        self.wires: set[Wire] = set()
        self._payloads = payloads
        self._connect = connect
        self._now = now
        self._on_done = on_done
        self._idle: list[Wire] = []
        self._connecting = 0
        self._in_flight = 0
        self._sent = 0
        # The schedule.
        self._due: deque[int] = deque()
        self._schedule: Iterator[int] = iter(())
        self.next_due = NEVER
        self._warmup_left = plan.warmup_requests
        self._measured = 0
        self._is_exhausted = False

    def start(self) -> None:
        """Starts the warm-up, or the window at once if there is none."""
        now = self._now()
        if self._warmup_left == 0:
            self._open_window(now + self.plan.warmup)
        if self.plan.rate is not None:
            self._schedule = due_times(self.plan, now)
            self.next_due = next(self._schedule)
        self._connect_wanted()

    # What the driver reports.

    def on_due(self) -> None:
        """Puts everything that is due by now into the line and sends what there are connections for."""
        now = self._now()
        while self.next_due <= now:
            intended = self._admit(self.next_due)
            if intended is None:
                self.next_due = NEVER
                break
            self._due.append(intended)
            self.next_due = next(self._schedule)
        while self._due and self._idle:
            self._send(self._idle.pop(), self._due.popleft(), now)
        self._connect_wanted()
        self._finish_if_done(now)

    def connected(self, wire: Wire) -> None:
        self._connecting -= 1
        self.wires.add(wire)
        wire.is_busy = False
        self._send_next(wire, self._now())

    def connect_failed(self, kind: str) -> None:
        """No connection: one request fails of it. The next attempt waits for ``sweep``, so as not to spin."""
        self._connecting -= 1
        now = self._now()
        intended = self._take(now)
        if intended is not None:
            self.recording.failed(intended, now, kind)
        self._finish_if_done(now)

    def answered(self, wire: Wire, status: int, size: int, keep_alive: bool) -> None:
        """A complete answer of ``size`` bytes; its connection sends the next request at once."""
        now = self._now()
        self._in_flight -= 1
        wire.is_busy = False
        self.recording.answered(wire.intended, now, status, size)
        if keep_alive:
            self._send_next(wire, now)
        else:
            self._drop(wire)
            self._finish_if_done(now)

    def failed(self, wire: Wire, kind: str) -> None:
        """The request under way on ``wire`` ended without an answer; the connection is given up."""
        now = self._now()
        self._in_flight -= 1
        wire.is_busy = False
        self.recording.failed(wire.intended, now, kind)
        self._drop(wire)
        self._finish_if_done(now)

    def lost(self, wire: Wire) -> None:
        """The server closed a connection that had nothing under way; that fails no request."""
        if wire in self._idle:
            self._idle.remove(wire)
        self._drop(wire)

    def sweep(self) -> None:
        """Ends what ran past its time, closes the window, opens missing connections."""
        now = self._now()
        latest = now - self.plan.timeout
        for wire in [wire for wire in self.wires if wire.is_busy and wire.sent_at <= latest]:
            self.failed(wire, "timeout")
        while self._due and self._due[0] <= latest:
            self._count_unsent(self._due.popleft())
        if now >= self.recording.ended_at:
            self._is_exhausted = True
        self._connect_wanted()
        self._finish_if_done(now)

    def stop(self) -> None:
        """Ends the run now (Ctrl-C); what is under way is counted as unfinished."""
        now = self._now()
        self._is_exhausted = True
        self.recording.interrupted = True
        self.recording.ended_at = min(self.recording.ended_at, now)
        for wire in self.wires:
            if wire.is_busy and wire.intended >= self.recording.started_at:
                self.recording.unfinished += 1
        while self._due:
            self._count_unsent(self._due.popleft())
        self._in_flight = 0
        self._finish_if_done(now)

    # The schedule.

    def _admit(self, intended: int) -> int | None:
        """The intended time, ``None`` if the run has no more requests; opens the window after warm-up requests."""
        if self._is_exhausted:
            return None
        if self.recording.started_at == NEVER:
            if self._warmup_left > 0:
                self._warmup_left -= 1
                return intended - 1  # before the window, even if that opens within the same step of the clock
            self._open_window(intended)
        if intended < self.recording.started_at:
            return intended
        if intended >= self.recording.ended_at or self._measured == self.plan.requests:
            self._is_exhausted = True
            return None
        self._measured += 1
        return intended

    def _open_window(self, at: int) -> None:
        self.recording.started_at = at
        if self.plan.duration is not None:
            self.recording.ended_at = at + self.plan.duration

    def _take(self, now: int) -> int | None:
        """Intended time of the next request that may go out now, ``None`` if there is none."""
        if self.plan.rate is not None:
            return self._due.popleft() if self._due else None
        return self._admit(now)

    def _send_next(self, wire: Wire, now: int) -> None:
        intended = self._take(now)
        if intended is None:
            self._idle.append(wire)
            self._finish_if_done(now)
        else:
            self._send(wire, intended, now)

    def _send(self, wire: Wire, intended: int, now: int) -> None:
        payload = self._payloads[self._sent % len(self._payloads)]
        self._sent += 1
        self._in_flight += 1
        wire.intended = intended
        wire.sent_at = now
        wire.is_busy = True
        if intended >= self.recording.started_at:
            self.recording.sent(intended, now, len(payload))
        wire.send(payload)

    def _count_unsent(self, intended: int) -> None:
        if intended >= self.recording.started_at:
            self.recording.unsent += 1

    # Connections.

    def _connect_wanted(self) -> None:
        if self.plan.rate is None:
            wanted = 0 if self._is_exhausted else self.plan.concurrency - len(self.wires)
        else:
            wanted = min(len(self._due), self.plan.in_flight_max - len(self.wires))
        while self._connecting < wanted:
            self._connecting += 1
            self._connect()

    def _drop(self, wire: Wire) -> None:
        self.wires.discard(wire)
        wire.close()
        if not self.is_done:
            self._connect_wanted()

    def _finish_if_done(self, now: int) -> None:
        if self.is_done or not self._is_exhausted or self._in_flight or self._due:
            return
        self.is_done = True
        self.recording.close(now)
        self._on_done()
