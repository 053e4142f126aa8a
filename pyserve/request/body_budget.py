"""How many bytes of request bodies may be in memory at one time, and who gives way when they are all taken.

Bytes are taken as they come: a body that is announced and not sent takes none. While there is room nobody is limited,
and one address may have all of it, since all clients behind a proxy have one address. Once somebody finds no room:

- An address has a share: an equal part for each address that holds bytes or waits for some.
- One that is within its share gets room from those that are over theirs: bodies that are still coming are given up, the
  slowest first. Those that are complete are being worked on, and are left alone.
- If that is not enough it is refused, and waits, which means: for WAIT_S nobody takes more than a share.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Hashable
from typing import Protocol
from weakref import WeakValueDictionary

from pyserve.errors import OverloadedError

# Bodies of at most so many bytes that come in one piece are in nobody's account: the queues of the models bound them.
QUICK_SIZE_MAX = 64 * 1024
# After a refusal; clients are asked to come again after 1 s.
WAIT_S = 3.0
# Addresses that may wait. More only make the shares smaller.
WAITING_COUNT_MAX = 256
# Of the budget: what is made free beyond what is needed, so that not each piece of a body has to ask for it.
_SPARE_FRACTION = 64
# Bits of an IPv6 address that tell one network from another; within it a client may have any address.
_IPV6_NETWORK_BITS = 64


class Coming(Protocol):
    """A body of which more is to come, and which may be given up for another client's.

    Attributes:
        reserved: bytes that it holds.
    """

    reserved: int

    def pace(self) -> float:
        """Bytes per second so far."""

    def give_up(self, error: OverloadedError) -> None:
        """Keeps nothing, gives back what it holds, and is answered with ``error``."""


class BodyBudget:
    """Bytes of request bodies that may be in memory at one time. Share one among all listeners of a process.

    Attributes:
        size: bytes that are taken.
        size_max: bytes that may be.
        quick_max: up to here ``size`` may grow without looking at shares: ``size_max``, or 0 while somebody waits.
        holder_count: accounts that hold bytes.
        coming_count: bodies of which more is to come.
    """

    __slots__ = (
        "_accounts", "_clock", "_unnamed", "_waiting", "coming_count", "holder_count", "quick_max", "size", "size_max",
    )  # fmt: skip

    def __init__(self, size_max: int, clock: Callable[[], float] = time.monotonic):
        self.size_max = self.quick_max = size_max
        self.size = 0
        self.holder_count = 0
        self.coming_count = 0
        self._clock = clock
        self._accounts: WeakValueDictionary[str, Account] = WeakValueDictionary()
        self._waiting: dict[Account, float] = {}  # until when
        self._unnamed = Account(self)

    def account(self, client: str) -> Account:
        """Of the address of ``client``, which is ``host:port`` or a word for all that have none."""
        address = address_of(client)
        account = self._accounts.get(address)
        if account is None:
            account = self._accounts[address] = Account(self)
        return account

    def reserve_quick(self, size: int) -> bool:
        """Takes ``size`` bytes, or nothing and returns False if shares have to be looked at."""
        if self.size + size > self.quick_max:
            return False
        self.size += size
        return True

    def reserve(self, size: int) -> bool:
        """Takes ``size`` bytes in nobody's name, or nothing and returns False."""
        if self.size + size > self.quick_max and not self.has_room(self._unnamed, size):
            return False
        self.size += size
        return True

    def charge(self, size: int) -> None:
        """Takes ``size`` bytes in nobody's name, as they are in memory anyhow."""
        self.size += size

    def release(self, size: int) -> None:
        """Gives ``size`` bytes back."""
        self.size -= size

    def has_room(self, account: Account, size: int) -> bool:
        """Whether ``account`` may take ``size`` bytes more. Makes room for them if that is just; else it waits."""
        share, is_within = self._wanted(account, size)
        missing = size - self._room(size)
        if missing > 0 and is_within:
            self._make_room(account, share, missing + self.size_max // _SPARE_FRACTION)
        return self._settle(account, size, size <= self._room(size), share)

    def will_have_room(self, account: Account, size: int) -> bool:
        """The same of bytes that are only announced: nothing is made free yet."""
        share, is_within = self._wanted(account, size)
        missing = size - self._room(size, is_coming=True)
        if missing > 0 and is_within:
            missing -= sum(each.excess(share) for each in self._accounts.values() if each is not account)
        return self._settle(account, size, missing <= 0, share)

    # what a budget that several processes share has its own way for

    def _room(self, size: int, *, is_coming: bool = False) -> int:
        """Bytes of room, if ``size`` are wanted.

        Args:
            is_coming: they are not to be taken yet.
        """
        return self.size_max - self.size

    def _part(self) -> int:
        """Bytes that are divided among the addresses here."""
        return self.size_max

    def _set_quick_max(self) -> None:
        self.quick_max = 0 if self._waiting else self.size_max

    def _wanted(self, account: Account, size: int) -> tuple[int, bool]:
        """The share of ``account``, and whether ``size`` bytes more are within it."""
        self._forget_waiting()
        share = self._share(account)
        return share, account.size + size <= share

    def _settle(self, account: Account, size: int, is_free: bool, share: int) -> bool:
        others_wait = len(self._waiting) > (account in self._waiting)
        has_room = is_free and (account.size + size <= share or not others_wait)
        if has_room:
            self._waiting.pop(account, None)
        elif account.size <= share and self._others_hold(account) and len(self._waiting) < WAITING_COUNT_MAX:
            self._waiting[account] = self._clock() + WAIT_S
        self._set_quick_max()
        return has_room

    def _others_hold(self, account: Account) -> bool:
        return self.holder_count > (account.size > 0)

    def _share(self, account: Account) -> int:
        empty = sum(not each.size for each in self._waiting if each is not account)
        return self._part() // (self.holder_count + (account.size == 0) + empty)

    def _forget_waiting(self) -> None:
        if self._waiting:
            now = self._clock()
            self._waiting = {account: until for account, until in self._waiting.items() if until > now}

    def _make_room(self, account: Account | None, share: int, wanted: int) -> None:
        error = body_budget_error(self)
        others = [each for each in self._accounts.values() if each.size > share and each is not account]
        for other in sorted(others, key=lambda each: each.size, reverse=True):
            for body in sorted(other.coming, key=lambda each: each.pace()):
                if wanted <= 0 or other.size <= share:
                    break
                if body.reserved:
                    wanted -= body.reserved
                    body.give_up(error)


class Account:
    """What the bodies of one address hold: those that are coming, and those that came and are not answered yet.

    Attributes:
        size: bytes.
        coming: bodies of which more is to come; see `begin`.
        budget: that it is a part of.
    """

    __slots__ = ("__weakref__", "_kept", "budget", "coming", "size")

    def __init__(self, budget: BodyBudget):
        self.budget = budget
        self._kept: dict[Hashable, int] = {}
        self.size = 0
        self.coming: set[Coming] = set()

    def begin(self, body: Coming) -> None:
        """More of ``body`` is to come."""
        self.coming.add(body)
        self.budget.coming_count += 1

    def end(self, body: Coming) -> None:
        """No more of ``body`` is to come, if that was not said before."""
        if body in self.coming:
            self.coming.discard(body)
            self.budget.coming_count -= 1

    def will_have_room(self, size: int) -> bool:
        """Whether a body of ``size`` bytes has a chance. Nothing is taken."""
        budget = self.budget
        return budget.size + size <= budget.quick_max or budget.will_have_room(self, size)

    def take(self, size: int) -> bool:
        """Takes ``size`` bytes, which have come; or nothing and returns False."""
        budget = self.budget
        if budget.size + size > budget.quick_max and not budget.has_room(self, size):
            return False
        budget.size += size
        self._grow(size)
        return True

    def charge(self, size: int) -> None:
        """Takes ``size`` bytes, as they are in memory anyhow."""
        self.budget.charge(size)
        self._grow(size)

    def release(self, size: int) -> None:
        """Gives ``size`` bytes back."""
        self.budget.release(size)
        self._grow(-size)

    def keep(self, key: Hashable, size: int) -> None:
        """A body of ``size`` bytes, which are taken, is complete and stays in memory until `forget`."""
        self._kept[key] = size

    def forget(self, key: Hashable) -> None:
        """It is nobody's any more. The budget gets its bytes back from the caller."""
        self._grow(-self._kept.pop(key, 0))

    def excess(self, share: int) -> int:
        """Bytes above ``share`` that are of bodies which may be given up."""
        over = self.size - share
        return min(over, sum(body.reserved for body in self.coming)) if over > 0 else 0

    def _grow(self, size: int) -> None:
        before = self.size
        self.size = before + size
        if not before:
            self.budget.holder_count += self.size > 0
        elif not self.size:
            self.budget.holder_count -= 1


def address_of(client: str) -> str:
    """What stands for the client's address: that of its network in IPv6, where a client has any number of them."""
    host = client.rpartition(":")[0]
    if not host.startswith("["):
        return host or client
    address = ipaddress.IPv6Address(host[1:-1].partition("%")[0])
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return f"[{int(address) >> (128 - _IPV6_NETWORK_BITS):x}]"


def body_budget_error(budget: BodyBudget) -> OverloadedError:
    """There is no room for the bytes of one more request."""
    return OverloadedError(
        f"Request bodies in memory would pass the limit of {budget.size_max} bytes; try again later.",
        detail={"reason": "body budget", "body_budget_size": budget.size_max},
        headers={"Retry-After": "1"},
    )
