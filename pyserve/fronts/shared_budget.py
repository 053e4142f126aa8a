"""One budget of bodies in memory for the front ends and the engine, though each of these processes counts its own.

A process may use all that the others leave. What it holds stands in a ledger in shared memory (csrc/front_ledger.h):
not each byte, but a lease a little above what it has, so that few bodies have to look there. Shares of addresses are
each process's own. Among processes it is as among addresses: while there is room nobody is limited; once one finds
none,

- it has a floor, whatever the others hold, so that small requests are answered behind a process that has all of it;
- if it is within an even part, the others see that at their next look, LOOK_S later at most, and take no more than
  theirs for WAIT_S: bodies that are still coming are given up, the slowest first.

So all together hold no more than ``size_max`` and the floors, which are a sixteenth of it. What grows under a budget
that was not asked, as calls of gRPC do before they are looked at, comes on top for that moment, as with one process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from pyserve._front import LEDGER_PAGE_SIZE, Ledger
from pyserve.request.body_budget import WAIT_S, Account, BodyBudget

# Between two looks at what others want.
LOOK_S = 0.25
# Bytes that are leased beyond what is needed now.
LEASE_STEP = 256 * 1024
_FLOORS_FRACTION = 16


class LedgerFile:
    """The memory of a ledger, in the process that looks after the others. A descriptor, until `close`.

    Args:
        count: of processes.
        size_max: bytes of all of them.

    Attributes:
        fd: for the others, who map it.

    Raises:
        OSError: there is no memory, or no descriptor.
    """

    def __init__(self, count: int, size_max: int):
        import fcntl  # not above: there is none where the package is only imported, such as to build its pages

        self._count, self._size_max = count, size_max
        self.fd = os.memfd_create("pyserve-ledger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, count * LEDGER_PAGE_SIZE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(self.fd)
            raise

    def of(self, number: int) -> Ledger:
        """The view of the process of this number."""
        return Ledger(self.fd, self._count, number, self._size_max)

    def clear(self, number: int) -> None:
        """That process has gone: it holds nothing, and wants nothing."""
        os.pwrite(self.fd, bytes(16), number * LEDGER_PAGE_SIZE)

    def close(self) -> None:
        os.close(self.fd)


class SharedBudget(BodyBudget):
    """This process's view. Loop thread only.

    Args:
        size_max: bytes of all processes.
        count: of processes.

    Attributes:
        floor_size: bytes that this process may have whatever the others hold.
    """

    __slots__ = ("_lease", "_ledger", "_returns_below", "floor_size")

    def __init__(self, size_max: int, count: int, clock: Callable[[], float] = time.monotonic):
        super().__init__(size_max, clock)
        self.floor_size = size_max // _FLOORS_FRACTION // count
        self.quick_max = 0
        self._ledger: Ledger | None = None
        self._lease = 0
        self._returns_below = 0

    @property
    def lease(self) -> int:
        """Bytes that stand in the ledger."""
        return self._lease

    def attach(self, ledger: Ledger) -> None:
        """From now on the others are those of ``ledger``: another engine has come. Before the first one there are only
        the floor's bytes."""  # fmt: skip
        self._ledger = ledger
        self._hold_at_least(self.size)

    def look(self) -> None:
        """Sees what others want. To be called every LOOK_S."""
        if self._ledger is None:
            return
        self._ledger.charge(self._lease)  # again, if something wrong was written there
        self.release(0)  # of what native code has given back, which leaves the lease as it is
        self._forget_waiting()
        part = self._part()
        over = self.size - part
        if over > 0 and self.holder_count:
            self._make_room(None, part // self.holder_count, over + LEASE_STEP)
        self._set_quick_max()

    def charge(self, size: int) -> None:
        self.size += size
        if self.size > self._lease:
            self._hold_at_least(self.size)

    def release(self, size: int) -> None:
        self.size -= size
        if self.size < self._returns_below:
            self._hold_at_least(self.size + LEASE_STEP)

    # of `BodyBudget`

    def _room(self, size: int, *, is_coming: bool = False) -> int:
        wanted, ledger, part = self.size + size, self._ledger, self._part()
        if self._lease < wanted <= part and not is_coming:
            self._extend(wanted)
        most = self._lease
        if is_coming and ledger is not None:
            most += ledger.free
        return min(max(most, self.floor_size), part) - self.size

    def _part(self) -> int:
        if self._ledger is None:
            return self.size_max
        now = self._now()
        return self._even_part(now) if self._ledger.wanting_count(now) else self.size_max

    def _set_quick_max(self) -> None:
        self.quick_max = 0 if self._waiting else min(self._lease, self._part())

    def _settle(self, account: Account, size: int, is_free: bool, share: int) -> bool:
        has_room = super()._settle(account, size, is_free, share)
        ledger = self._ledger
        if not has_room and ledger is not None and ledger.others:
            now = self._now()
            if account.size + size <= share * self._even_part(now) // max(1, self._part()):
                ledger.want(now + int(WAIT_S * 1e9))
        return has_room

    # the ledger

    def _now(self) -> int:
        return int(self._clock() * 1e9)

    def _even_part(self, now: int) -> int:
        assert self._ledger is not None
        return self.size_max // (1 + self._ledger.busy_count(self.floor_size, now))

    def _extend(self, wanted: int) -> None:
        ledger = self._ledger
        for size in (wanted + LEASE_STEP, wanted):
            if ledger is not None and ledger.hold(size):
                self._set_lease(size)
                return
        if wanted <= self.floor_size:
            self._hold_at_least(self.floor_size)

    def _hold_at_least(self, size: int) -> None:
        if self._ledger is not None:
            self._ledger.charge(size)
        self._set_lease(size)

    def _set_lease(self, size: int) -> None:
        self._lease = size
        self._returns_below = size - 2 * LEASE_STEP
        self._set_quick_max()
