"""Second runs: which requests of a worker that died are run once more, so that only the one at fault fails.

Of a batch any request may have ended the worker. Each is run again by itself, once; the one that ends a second worker
fails. A worker that runs many requests at a time would run none but these for too long: there they come in groups, and
a group fails together.

A lane marks them in `Pending.flags`, by which the engine knows them (csrc/reruns.h).
"""

from __future__ import annotations

from typing import Any

from pyserve.errors import JsonObject
from pyserve.lanes.pending import Pending

# Of a request that is run a second time; its group's number is above.
RERUN = 1 << 15
_GROUP_SHIFT = 16
_GROUP_MASK = 0xFFFF
# Its time was over in a batch of several: it waits for the end of the batch, to be run again.
OVERRUN = 1 << 14
# Of a worker that runs many at a time: into how many groups its requests come.
GROUPS_MAX = 16

_FIX = "find out what this request makes the handler do: `pyserve debug ARCHIVE -i BODY` runs it in a terminal"


class GroupNumbers:
    """Marks requests for their second run; two groups that wait at the same time have different numbers."""

    def __init__(self) -> None:
        self._next = 0

    def mark(self, waiting: list[Pending], *, is_alone: bool) -> None:
        """``is_alone``: each is a group of its own; else they make GROUPS_MAX groups at most."""
        size = 1 if is_alone else -(-len(waiting) // GROUPS_MAX)
        for index, pending in enumerate(waiting):
            number = (self._next + index // size) & _GROUP_MASK
            pending.flags = pending.flags & (1 << _GROUP_SHIFT) - 1 & ~OVERRUN | RERUN | number << _GROUP_SHIFT
        self._next += -(-len(waiting) // size)


def death_detail(pending: Pending, completion: Any) -> JsonObject:
    """For ``detail`` of the answer to a request that fails because its worker died.

    Args:
        completion: the engine's, of what the worker had.
    """
    ending = completion.message or "the worker process ended"
    detail: JsonObject = {"exception": "WorkerDied", "text": ending}
    if pending.flags & RERUN:
        others = completion.batch_size - 1
        how = f"together with {others} others of that batch" if others > 0 else "by itself"
        detail["text"] = f"it was in a batch that ended its worker, and ended another one, run {how}: {ending}"
        detail["fix"] = _FIX
    elif completion.was_alone:
        detail["text"] = f"its worker ended while it ran this request and no other: {ending}"
        detail["fix"] = _FIX
    return detail
