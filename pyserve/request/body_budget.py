"""How many bytes of request bodies may be in memory at one time."""

from __future__ import annotations

from pyserve.errors import OverloadedError


class BodyBudget:
    """Bytes of request bodies that may be in memory at one time. Share one among all listeners of a process."""

    __slots__ = ("size", "size_max")

    def __init__(self, size_max: int):
        self.size_max = size_max
        self.size = 0

    def reserve(self, size: int) -> bool:
        """Takes ``size`` bytes, or nothing and returns False."""
        if self.size + size > self.size_max:
            return False
        self.size += size
        return True

    def release(self, size: int) -> None:
        self.size -= size


def body_budget_error(budget: BodyBudget) -> OverloadedError:
    """There is no room for the bytes of one more request."""
    return OverloadedError(
        f"Request bodies in memory would pass the limit of {budget.size_max} bytes; try again later.",
        detail={"reason": "body budget", "body_budget_size": budget.size_max},
        headers={"Retry-After": "1"},
    )
