"""One budget of bodies for several processes: all of it for one that is alone, never more for all of them."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyserve.errors import OverloadedError
from pyserve.fronts.shared_budget import LEASE_STEP, LedgerFile, SharedBudget
from pyserve.request.body_budget import WAIT_S, Account

MAX = 64 << 20
COUNT = 3
MIB = 1 << 20


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Body:
    """One that is coming to ``account``."""

    def __init__(self, account: Account, size: int = 0, speed: float = 1.0):
        self.account, self.speed = account, speed
        self.reserved = 0
        self.given_up: OverloadedError | None = None
        account.begin(self)
        if size:
            assert self.take(size)

    def take(self, size: int) -> bool:
        if not self.account.take(size):
            return False
        self.reserved += size
        return True

    def complete(self) -> None:
        self.account.end(self)

    def pace(self) -> float:
        return self.speed

    def give_up(self, error: OverloadedError) -> None:
        self.given_up = error
        self.account.end(self)
        self.account.release(self.reserved)
        self.reserved = 0


class Stand:
    """All processes' budgets, in one process."""

    def __init__(self, file: LedgerFile):
        self.file = file
        self.clock = Clock()
        self.budgets = [self.new() for _ in range(COUNT)]
        for number in range(COUNT):
            self.budgets[number].attach(file.of(number))

    def new(self) -> SharedBudget:
        return SharedBudget(MAX, COUNT, self.clock)

    def look(self) -> None:
        for each in self.budgets:
            each.look()


@pytest.fixture
def stand() -> Iterator[Stand]:
    file = LedgerFile(COUNT, MAX)
    yield Stand(file)
    file.close()


def test_one_process_may_have_all_of_it(stand: Stand) -> None:
    first, second, _ = stand.budgets
    account = first.account("10.0.0.1:1")
    assert account.will_have_room(MAX) and account.take(MAX) and not account.take(1)
    assert first.size == MAX and second.size == 0
    account.release(MAX)
    assert second.reserve(MAX - LEASE_STEP) and not first.reserve(2 * LEASE_STEP + first.floor_size)


def test_all_others_leave_is_its_own(stand: Stand) -> None:
    first, second, third = stand.budgets
    assert first.reserve(10 * MIB) and second.reserve(20 * MIB)
    assert third.reserve(33 * MIB) and not third.reserve(2 * MIB)
    second.release(20 * MIB)
    assert third.reserve(19 * MIB)


def test_small_bodies_do_not_look_into_the_ledger(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = stand.budgets[0]
    assert budget.reserve(1)
    monkeypatch.setattr(budget, "_ledger", None)
    for _ in range(1000):
        assert budget.reserve_quick(LEASE_STEP - 1)
        budget.release(LEASE_STEP - 1)


def test_all_together_never_hold_more_than_the_limit_and_the_floors(stand: Stand, seed: int) -> None:
    rng = random.Random(seed)
    held: list[list[int]] = [[] for _ in range(COUNT)]
    most = over = 0
    for _ in range(20_000):
        number = rng.randrange(COUNT)
        budget, own = stand.budgets[number], held[number]
        if own and rng.random() < 0.45:
            budget.release(own.pop(rng.randrange(len(own))))
        else:
            size = rng.choice((100, 5000, 60_000, MIB, 6 * MIB, 30 * MIB))
            take = rng.choice((budget.reserve_quick, budget.reserve))
            if take(size):
                own.append(size)
        if rng.random() < 0.01:
            stand.clock.now += rng.uniform(0, 2)
            stand.look()
        total = sum(map(sum, held))
        assert [each.size for each in stand.budgets] == list(map(sum, held))
        assert all(each.size <= each.lease for each in stand.budgets)
        most, over = max(most, total), over + (total > MAX)
        assert total <= MAX + COUNT * stand.budgets[0].floor_size <= MAX + MAX // 16
    assert most > MAX * 0.9
    for number, own in enumerate(held):
        stand.budgets[number].release(sum(own))
    assert all(each.lease <= 2 * LEASE_STEP + each.floor_size for each in stand.budgets)


def test_behind_one_that_has_all_of_it_another_has_its_floor(stand: Stand) -> None:
    first, second, _ = stand.budgets
    assert first.reserve(MAX)
    assert second.reserve(second.floor_size) and not second.reserve(1)
    second.release(second.floor_size)
    assert second.reserve(second.floor_size)


def test_one_that_waits_gets_its_part_from_bodies_that_are_still_coming(stand: Stand) -> None:
    first, second, _ = stand.budgets
    fat, thin = first.account("10.0.0.1:1"), second.account("10.0.0.2:1")
    bodies = [Body(fat, 8 * MIB, speed) for speed in (5, 3, 8, 4, 7, 6, 2, 1)]
    assert first.size == MAX
    assert not Body(thin).take(6 * MIB)
    stand.look()
    assert first.size <= MAX // 2
    gone = [body.speed for body in bodies if body.given_up is not None]
    assert sorted(gone) == [1, 2, 3, 4], "the slowest, as many as bring it to an even part"
    assert Body(thin).take(6 * MIB)
    assert not Body(fat).take(20 * MIB), "no more than its part while the other one waits"
    stand.clock.now += WAIT_S + 1
    stand.look()
    assert Body(fat).take(20 * MIB)


def test_complete_bodies_are_left_alone_but_there_are_no_more_of_them(stand: Stand) -> None:
    first, second, _ = stand.budgets
    fat, thin = first.account("10.0.0.1:1"), second.account("10.0.0.2:1")
    bodies = [Body(fat, 8 * MIB) for _ in range(8)]
    for body in bodies:
        body.complete()
    assert not Body(thin).take(6 * MIB)
    stand.look()
    assert first.size == MAX and first.quick_max <= MAX // 2
    fat.release(8 * MIB)  # one is answered
    assert not Body(fat).take(8 * MIB)
    assert Body(thin).take(6 * MIB)


def test_nobody_waits_for_more_than_an_even_part(stand: Stand) -> None:
    """Else two bodies of more than that would push each other out for ever."""
    first, second, _ = stand.budgets
    coming = Body(first.account("10.0.0.1:1"), 40 * MIB)
    assert not Body(second.account("10.0.0.2:1")).take(40 * MIB)
    stand.look()
    assert coming.given_up is None


def test_those_who_hold_bytes_and_those_who_wait_have_even_parts(stand: Stand) -> None:
    accounts = [budget.account(f"10.0.0.{number}:1") for number, budget in enumerate(stand.budgets)]
    for account in accounts[:2]:
        for size in (8, 8, 8, 7):
            Body(account, size * MIB)
    assert not Body(accounts[2]).take(10 * MIB)
    stand.look()
    assert all(budget.size <= MAX // 3 for budget in stand.budgets)
    assert Body(accounts[2]).take(10 * MIB)


def test_within_a_process_it_is_as_with_one(stand: Stand) -> None:
    budget = stand.budgets[0]
    fat, thin = budget.account("10.0.0.1:1"), budget.account("10.0.0.2:1")
    slow, quick = Body(fat, 40 * MIB, 1.0), Body(fat, 24 * MIB, 2.0)
    assert Body(thin).take(8 * MIB)
    assert slow.given_up is not None and quick.given_up is None


def test_what_is_charged_counts_for_the_others(stand: Stand) -> None:
    first, second, _ = stand.budgets
    first.account("10.0.0.1:1").charge(MAX - MIB)
    first.charge(MIB)
    assert not second.reserve(second.floor_size + 1)
    first.release(MAX)
    assert second.reserve(MAX - 2 * LEASE_STEP)


def test_one_that_has_gone_is_cleared(stand: Stand) -> None:
    first, second, _ = stand.budgets
    assert first.reserve(MAX)
    assert not second.account("10.0.0.2:1").take(8 * MIB)
    stand.file.clear(0)
    assert second.account("10.0.0.2:1").take(8 * MIB)
    first = stand.budgets[0] = stand.new()  # another one in its place
    first.attach(stand.file.of(0))
    stand.clock.now += WAIT_S  # the second one wanted more
    assert first.reserve(50 * MIB) and not first.reserve(8 * MIB)


def test_another_ledger_knows_what_is_held(stand: Stand) -> None:
    first, second, _ = stand.budgets
    assert first.reserve(60 * MIB)
    file = LedgerFile(COUNT, MAX)
    first.attach(file.of(0)), second.attach(file.of(1))
    assert not second.reserve(6 * MIB) and second.reserve(second.floor_size)
    file.close()


def test_before_there_is_an_engine_there_is_the_floor() -> None:
    budget = SharedBudget(MAX, COUNT)
    assert budget.reserve(budget.floor_size) and not budget.reserve(1)
    budget.look()
    assert not budget.account("10.0.0.1:1").will_have_room(1)


@pytest.mark.parametrize("rubbish", [2**64 - 1, 2**63, MAX + 1])
def test_rubbish_leaves_the_others_their_floor_and_is_written_over(stand: Stand, rubbish: int) -> None:
    _, second, third = stand.budgets
    os.pwrite(stand.file.fd, struct.pack("<Qq", rubbish, 2**63 - 1), 0)
    assert second.reserve(second.floor_size) and third.reserve(third.floor_size)
    assert not second.reserve(1)
    stand.look()
    assert second.quick_max >= second.floor_size and second.reserve(30 * MIB)


def test_nobody_can_write_the_page_of_another_one() -> None:
    file = LedgerFile(COUNT, MAX)
    ledger = file.of(1)
    inode = str(os.fstat(file.fd).st_ino)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "pyserve-ledger" in line]
    sizes = {rights: _size(addresses) for addresses, rights, _, _, of, *_ in maps if of == inode}
    assert sizes == {"r--s": 4096 * COUNT, "rw-s": 4096}
    with pytest.raises(PermissionError):
        os.ftruncate(file.fd, 0)
    assert ledger.hold(MAX)
    file.close()


def _size(addresses: str) -> int:
    first, last = addresses.split("-")
    return int(last, 16) - int(first, 16)


def test_numbers_that_no_ledger_has() -> None:
    file = LedgerFile(2, 100)
    try:
        with pytest.raises(ValueError, match="no such process"):
            file.of(2)
        with pytest.raises(IndexError):
            file.of(1).held_by(2)
    finally:
        file.close()
