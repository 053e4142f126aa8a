"""One wanted worker of a model, and what all of them together come to."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pyserve.errors import ServeError
from pyserve.lanes.restart_policy import WAIT_MAX_S, Cause, Decision
from pyserve.lanes.worker_handle import WorkerHandle

STARTING, READY, WAITING, STOPPING, FAILED = "starting", "ready", "waiting", "stopping", "failed"

# Of all workers of a model, see `Condition`.
IDLE, SERVING, COMING, DOWN, GIVEN_UP = "idle", "serving", "coming", "down", "given up"


class Slot:
    """One wanted worker: the process that it has now, and how it fares.

    Attributes:
        state: see `pyserve.lanes.workers`.
        handle: its process, while there is one.
        core_id: the engine's id of it, while it takes batches.
        error: why it is FAILED, or why the last process ended.
        failure: the error of its last load, if that failed.
        decision: what the policy said after its last end.
        next_start_at: when its next process is started while it is WAITING, s of the monotonic clock.
        is_down: it is no worker to wait for, until one of its processes is loaded.
        is_hopeless: whoever asked for it need not wait any longer.
        kill_reason: why we ended the process.
        interrupted_batch: the batch whose handler call was asked to end.
        died_in_rerun: the last process ended in the second run of a request that may have ended another one.
        is_wanted: False once it was told to go.
        hurry: set to end the pause before its next process.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.state = STARTING
        self.handle: WorkerHandle | None = None
        self.core_id: int | None = None
        self.started_at = datetime.now()
        self.error = ""
        self.is_wanted = True
        self.failure: ServeError | None = None
        self.decision: Decision | None = None
        self.next_start_at = 0.0
        self.is_down = self.is_hopeless = False
        self.kill_reason = ""
        self.died_in_rerun = False
        self.interrupted_batch = -1
        self.task: asyncio.Task[None] | None = None
        self.hurry = asyncio.Event()

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing to wait for: it is ready, or will not be soon."""
        return self.state in (READY, FAILED) or self.is_hopeless

    def begin(self) -> None:
        """Another process is about to be started."""
        self.state, self.started_at = STARTING, datetime.now()
        self.kill_reason, self.interrupted_batch = "", -1

    def loaded(self) -> None:
        """Its process takes batches."""
        self.state = READY
        self.is_down = self.is_hopeless = False

    def lost(self, error: str) -> None:
        """Its process takes no batches any more; how it ended is not known yet."""
        self.state, self.next_start_at = WAITING, 0.0
        self.error, self.failure = f"its worker ended{f' ({error})' if error else ''}", None

    def ended(self, error: str, failure: ServeError | None, decision: Decision) -> None:
        """Its process is gone. ``failure``: of its load, if it was not loaded."""
        self.error, self.failure, self.decision = error, failure, decision
        self.is_hopeless = decision.is_hopeless
        if not decision.restarts:
            self.state = FAILED
            return
        self.state = WAITING
        self.next_start_at = time.monotonic() + decision.delay_s
        if decision.delay_s > WAIT_MAX_S:
            self.is_down = True

    def cause(self, error: BaseException | None = None) -> Cause:
        """What ended its process; ``error``: of its load."""
        handle = self.handle
        if handle is not None and handle.exited.done():
            if handle.is_lost:
                return Cause.LOST
            if handle.has_lost_device:
                return Cause.DEVICE
            if handle.was_killed and not self.kill_reason:
                return Cause.KILLED
        told = getattr(error, "cause", None)
        return told if isinstance(told, Cause) else Cause.MODEL


@dataclass(frozen=True)
class Condition:
    """How the workers of a model are, all in all.

        IDLE      none is wanted
        SERVING   there is one
        COMING    one is being started, or will be within a second: requests wait for it
        DOWN      none, and the next start comes later, or such a one has failed: requests are refused
        GIVEN_UP  none, and none will be started before somebody asks for it

    Attributes:
        state: one of these.
        error: why there is none; ``""`` while there is one, and before the first.
        failure: the same, if it is the error of a load.
        next_start_at: when the next process is started, s of the monotonic clock; 0 if that is not known.
    """

    state: str
    error: str = ""
    failure: ServeError | None = None
    next_start_at: float = 0.0

    @property
    def may_take(self) -> bool:
        """Whether requests are admitted."""
        # One that is READY without taking batches has just ended, and is being replaced.
        return self.state in (SERVING, COMING)

    @property
    def recovers(self) -> bool:
        """Whether there will be a worker again without anybody's help."""
        return self.state in (COMING, DOWN)

    @property
    def retry_after_s(self) -> int:
        """Whole seconds after which asking again makes sense, at least 1."""
        return max(1, math.ceil(self.next_start_at - time.monotonic())) if self.next_start_at else 1


def condition_of(slots: Sequence[Slot], last: Slot | None) -> Condition:
    """What ``slots``, all that are wanted, come to.

    Args:
        last: the one that ended last, if none was loaded since.
    """
    if any(slot.state == READY for slot in slots):
        return Condition(SERVING)
    if not slots:
        return Condition(IDLE)
    error, failure = (last.error, last.failure) if last is not None else ("", None)
    left = [slot for slot in slots if slot.state != FAILED]
    if not left:
        return Condition(GIVEN_UP, error, failure)
    waits = [slot.next_start_at for slot in left if slot.state == WAITING]
    next_start_at = min(waits) if len(waits) == len(left) else 0.0
    state = DOWN if all(slot.is_down for slot in left) else COMING
    return Condition(state, error, failure, next_start_at)


def joined(conditions: Sequence[Condition], last: Condition | None) -> Condition:
    """The condition of several together. ``last``: the one that changed last."""
    for state in (SERVING, COMING, DOWN, GIVEN_UP):
        those = [each for each in conditions if each.state == state]
        if not those or state == SERVING:
            if those:
                return Condition(SERVING)
            continue
        teller = last if last is not None and last.error else those[0]
        starts = [each.next_start_at for each in those]
        return Condition(state, teller.error, teller.failure, min(starts))
    return Condition(IDLE)
