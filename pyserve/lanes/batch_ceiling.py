"""Batches that do not fit a device's memory: which size does, and for how long that is believed.

The workers find out (`csrc/worker_failed.cpp`): a batch for which memory ran out is run again in halves, and the
largest part that ran is the lane's ceiling if none of its requests was at fault alone. Larger batches are tried again
when somebody sets a batch size, and every RETRY_S: what took the memory may be gone. One that still does not fit costs
its requests nothing but the time of two more tries.

Loop thread only.
"""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)

RETRY_S = 600.0


class BatchCeiling:
    """Of one native lane.

    Args:
        core: a ``_core.Lane``.
        label: ``name version``, for the log.
    """

    def __init__(self, core: Any, label: str):
        self._core = core
        self._label = label
        self._size = 0  # as it was seen last; 0 while all sizes may fit
        self._seen_at = 0

    def look(self, now: int, batch_size: int) -> bool:
        """Whether it has changed since the last time.

        Args:
            now: ns.
            batch_size: of the settings.
        """
        if self._size and now - self._seen_at >= RETRY_S * 1e9:
            self._core.forget_ceiling()
        size = self._core.ceiling
        if size == self._size:
            return False
        self._size, self._seen_at = size, now
        if size:
            log.warning("%s: batches of more than %d do not fit the device's memory; batch_size is %d. Larger ones are "
                        "tried again in %.0f s, or after PUT batch_size", self._label, size, batch_size,
                        RETRY_S)  # fmt: skip
        return True

    def forget(self) -> None:
        """Somebody has set a batch size: all of them are tried again."""
        self._core.forget_ceiling()
        self._size = 0

    def limited(self, batch_size: int) -> int:
        """``batch_size``, as far as it fits."""
        return min(batch_size, self._size) if self._size else batch_size

    def note(self, batch_size: int) -> str:
        """Why batches are smaller than ``batch_size``; ``""`` if they are not."""
        if self.limited(batch_size) == batch_size:
            return ""
        return f"batches have at most {self._size} requests: more did not fit the memory of the device"
