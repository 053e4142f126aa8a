"""The audit: a share of live requests is run again, alone and without optimisations, and the answers are compared.

    request ──> live lane ──> answer ──> the client
       │                        │
       └─ every n-th: a copy ───┴──> waits ──> AuditLane (one process) ──> compared ──> counters, log

It never slows a live answer: what has no room is skipped and counted. It is off unless model-config.yaml says
``audit: 0.1%``. Only whole answers without an error are audited.

Loop thread only; answers are compared in another thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pyserve.errors import JsonObject, ServeError
from pyserve.lanes.audit import AuditLane, Repetition
from pyserve.models.audit_compare import KeptAnswer, Verdict, compare
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request

log = logging.getLogger(__name__)

# Requests that wait to be run again, or for their live answer, and the bytes of their bodies and answers.
WAITING_MAX = 16
KEPT_SIZE_MAX = 32 << 20
# After the process could not be started.
RETRY_PAUSE_S = 60.0
# Of differences in the log, after the first.
LOG_INTERVAL_S = 60.0


@dataclass
class _Sample:
    """A request that is to be run again.

    Attributes:
        repetition: how it is.
        live: what the client was sent; None until then.
    """

    request: Request
    repetition: Repetition
    size: int
    live: KeptAnswer | None = None


class Audit:
    """Of one version of a model.

    Args:
        label: ``name version``, for the log.
        share: of the requests, above 0 and at most 1; spread evenly, beginning with the first.
        tolerance: up to which a difference is rounding, as `comparison.difference` counts.
        open_lane: makes the lane, without a worker.
        causes: what may explain a difference, for the log.
        now: the clock, in seconds.

    Attributes:
        requests: that were run again and compared.
        differences: those of them that differed.
        skipped: requests that were to be audited and were not, by reason.
    """

    def __init__(
        self, label: str, *, share: float, tolerance: float, open_lane: Callable[[], Awaitable[AuditLane]],
        causes: str, now: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        # Constant.
        self._label = label
        self._share = share
        self._tolerance = tolerance
        self._open_lane = open_lane
        self._causes = causes
        self._now = now
        # Changes while it runs.
        self.requests = self.differences = 0
        self.skipped: Counter[str] = Counter()
        self._first: JsonObject | None = None
        self._credit = 1.0 - share
        self._answers_to_come: dict[Exchange, _Sample] = {}
        self._waiting: deque[_Sample] = deque()
        self._kept_size = 0
        self._lane: AuditLane | None = None
        self._task: asyncio.Task[None] | None = None
        self._no_start_until = 0.0
        self._quiet_until = 0.0
        self._untold = 0

    # --- choosing -------------------------------------------------------------------------------------------------

    def consider(self, exchange: Exchange, repetition: Repetition) -> None:
        """Called for every request before a lane has it; notes those that are to be audited."""
        self._credit += self._share
        if self._credit >= 1.0 - 1e-9:  # a sum of 1000 thousandths is not quite 1
            self._credit -= 1.0
            self._choose(exchange, repetition)

    def _choose(self, exchange: Exchange, repetition: Repetition) -> None:
        request = exchange.request
        self._drop_disconnected()
        if len(self._answers_to_come) + len(self._waiting) >= WAITING_MAX:
            self.skipped["too many wait"] += 1
            return
        body = request.body if repetition.body is None else repetition.body()
        if self._kept_size + len(body) > KEPT_SIZE_MAX:
            self.skipped["too large"] += 1
            return
        # A network may change the body where it lies.
        sample = _Sample(_copied(request, body), repetition, len(body))
        self._kept_size += sample.size
        self._answers_to_come[exchange] = sample
        exchange.watch(self._answered)

    def _drop_disconnected(self) -> None:
        for exchange in [each for each in self._answers_to_come if each.disconnected]:
            self._kept_size -= self._answers_to_come.pop(exchange).size

    def _answered(self, exchange: Exchange) -> None:
        """The live answer is there, and will leave next."""
        sample = self._answers_to_come.pop(exchange, None)
        response = exchange.response
        if sample is None or response is None:
            return
        self._kept_size -= sample.size
        size = sample.size + sum(memoryview(part).nbytes for part in (response.body, *response.tail))
        reason = ""
        if exchange.is_streaming:
            reason = "streamed"
        elif response.error is not None or response.status >= 400:
            reason = "error"
        elif self._kept_size + size > KEPT_SIZE_MAX:
            reason = "too large"
        if reason:
            self.skipped[reason] += 1
            return
        sample.live = KeptAnswer.of(response)
        sample.size = size
        self._kept_size += size
        self._waiting.append(sample)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    # --- running again --------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Until none waits any more."""
        while self._waiting:
            sample = self._waiting.popleft()
            try:
                reason = await self._audit(sample)
            except Exception:
                log.exception("%s: auditing a request failed", self._label)
                reason = "failed"
            self._kept_size -= sample.size
            if reason:
                self.skipped[reason] += 1

    async def _audit(self, sample: _Sample) -> str:
        """Returns why it could not be done, or ``""``."""
        lane = await self._running_lane()
        if lane is None:
            return "no process"
        answer = await lane.ask(sample.request, sample.repetition.again)
        if isinstance(answer, str):
            return answer
        assert sample.live is not None
        verdict = await asyncio.to_thread(compare, sample.live, KeptAnswer.of(answer), sample.repetition.read)
        self.requests += 1
        if verdict.difference > self._tolerance:
            self.differences += 1
            digest = await asyncio.to_thread(hashlib.sha256, sample.request.body)
            self._tell(verdict, sample.request.id, digest.hexdigest())
        return ""

    async def _running_lane(self) -> AuditLane | None:
        """The lane, with a process that is there or coming; None if there is none for now."""
        lane, now = self._lane, self._now()
        if lane is not None and lane.wanted_count:
            return lane
        if now < self._no_start_until:
            return None
        self._no_start_until = now + RETRY_PAUSE_S
        try:
            if lane is None:
                log.info("%s: starting a process for the audit of %g %% of the requests", self._label,
                         self._share * 100)  # fmt: skip
                lane = self._lane = await self._open_lane()
            lane.set_workers(1)
            failure = await lane.settled(lane.settings.startup_timeout_s)
        except ServeError as error:
            failure = error.reason()
        if failure:
            log.error("%s: the audit has no process, requests continue unaudited: %s", self._label, failure)
            return None
        self._no_start_until = 0.0
        return lane

    def _tell(self, verdict: Verdict, request_id: str, digest: str) -> None:
        now = self._now()
        if self._first is None:
            size = verdict.difference if math.isfinite(verdict.difference) else None
            self._first = {"requestId": request_id, "sha256": digest, "difference": size, "what": verdict.text}
        elif now < self._quiet_until:
            self._untold += 1
            return
        more = f"; {self._untold} more since the last such line" if self._untold else ""
        self._quiet_until, self._untold = now + LOG_INTERVAL_S, 0
        log.error(
            "%s: the audit got another answer: request %s, sha256 of its body %s, largest relative difference %.3g of "
            "%g allowed (%s)%s. It may come from %s; a model that is random or remembers requests differs by nature",
            self._label, request_id, digest, verdict.difference, self._tolerance, verdict.text, more, self._causes,
        )  # fmt: skip

    # --- what others ask ------------------------------------------------------------------------------------------

    def report(self) -> JsonObject:
        """What was found, for the management API: share, tolerance, counts, and the first difference if there is one.

        A difference that is no number, since the structure differs, is None.
        """
        self._drop_disconnected()  # at least as often as metrics are read
        told: JsonObject = {
            "share": self._share,
            "tolerance": self._tolerance,
            "requests": self.requests,
            "differences": self.differences,
            "skipped": dict(sorted(self.skipped.items())),
        }
        return told if self._first is None else {**told, "firstDifference": self._first}

    async def stop(self) -> None:
        """Ends the process and forgets what waits; the next request that is chosen starts another one."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._answers_to_come.clear()
        self._waiting.clear()
        self._kept_size = 0
        lane, self._lane = self._lane, None
        if lane is not None:
            await lane.end()


def _copied(request: Request, body: bytes | bytearray) -> Request:
    """The same request without the client's own time limit."""
    return Request(
        request.method, request.path, query=request.query, headers=list(request.headers), body=bytearray(body),
        client=request.client, id=request.id, has_timing=False,
    )  # fmt: skip
