"""What becomes of a model's workers, in TorchServe's words, which scripts and log agents look for.

W-9000-densenet161_1.0 State change null -> WORKER_STARTED
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from pyserve.log import about

log = logging.getLogger(__name__)

STARTED, MODEL_LOADED, STOPPED, ERROR, SCALED_DOWN = (
    "WORKER_STARTED", "WORKER_MODEL_LOADED", "WORKER_STOPPED", "WORKER_ERROR", "WORKER_SCALED_DOWN",
)  # fmt: skip


class WorkerLog:
    """The workers of one model, numbered from 0.

    Args:
        first_id: what TorchServe calls the first worker: its port.
        on_load: told the name of each worker that was loaded, and how many ms that took.

    Attributes:
        load_ms: how long the last load of each worker took, by its name.
    """

    def __init__(
        self, model: str, version: str, first_id: int = 9000, *, on_load: Callable[[str, float], None] | None = None
    ):
        self.load_ms: dict[str, float] = {}
        self._model = model
        self._version = version
        self._first_id = first_id
        self._on_load = on_load
        self._states: dict[int, str] = {}
        self._recovering: set[int] = set()

    def id(self, number: int) -> int:
        """As the management API and the log have it."""
        return self._first_id + number

    def name(self, number: int) -> str:
        """Such as ``W-9000-densenet161_1.0``."""
        return f"W-{self.id(number)}-{self._model}_{self._version}"

    def about_requests(self, ids: str) -> dict[str, str]:
        """For the ``extra`` of a record about requests of the model, joined by commas."""
        return about(model=self._model, version=self._version, request_id=ids)

    def about(self, number: int) -> dict[str, str]:
        """For a record's ``extra``."""
        return about(model=self._model, version=self._version, worker=self.name(number))

    def move(self, number: int, state: str) -> None:
        """A worker came into a state; nothing happens if it is in that one."""
        before = self._states.get(number)
        if state == before or (before is None and state == SCALED_DOWN):
            return
        log.info("%s State change %s -> %s", self.name(number), before or "null", state, extra=self.about(number))
        if state == SCALED_DOWN:
            del self._states[number]
            self.load_ms.pop(self.name(number), None)
            self._recovering.discard(number)
        else:
            self._states[number] = state

    def loaded(self, number: int, seconds: float) -> None:
        """It takes requests now."""
        self.load_ms[self.name(number)] = duration_ms = round(seconds * 1e3)
        if self._on_load is not None:
            self._on_load(self.name(number), duration_ms)
        self.move(number, STARTED)  # a thread may be ready before anybody has looked
        self.move(number, MODEL_LOADED)
        if number in self._recovering:
            self._recovering.remove(number)
            log.info("Auto recovery succeeded, reset recoveryStartTS", extra=self.about(number))

    def failed_to_load(self, number: int) -> None:
        """It will not take requests; perhaps the next one in its place will."""
        self.move(number, ERROR)
        if number in self._recovering:
            log.error("%s Auto recovery failed again", self.name(number), extra=self.about(number))

    def disconnected(self, number: int) -> None:
        """Its process ended unasked."""
        log.warning("%s Worker disconnected. %s", self.name(number), self._states.get(number, ""),
                    extra=self.about(number))  # fmt: skip
        self.move(number, STOPPED)
        if number not in self._recovering:
            self._recovering.add(number)
            log.info("Auto recovery start timestamp: %d", time.time() * 1000, extra=self.about(number))

    def over_time(self, number: int, limit_s: int) -> None:
        """A call of its handler runs past the limit."""
        log.error("%s Backend worker did not respond in given time: response_timeout=%d s; the call is interrupted",
                  self.name(number), limit_s, extra=self.about(number))  # fmt: skip

    def retrying(self, number: int, seconds: float, reason: str) -> None:
        """It is started again after a pause."""
        log.info("Retry worker: %d in %d seconds. %s", self.id(number), round(seconds), reason,
                 extra=self.about(number))  # fmt: skip
