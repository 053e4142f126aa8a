"""Bytes of bodies in memory: free for all while there is room, in shares once somebody finds none."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest

from pyserve.errors import OverloadedError
from pyserve.request.body_budget import WAIT_S, WAITING_COUNT_MAX, Account, BodyBudget, address_of

MAX = 6400
SPARE = MAX // 64


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class Body:
    """One that is coming to ``account``."""

    account: Account
    reserved: int = 0
    speed: float = 1.0
    given_up: OverloadedError | None = None

    def __post_init__(self) -> None:
        self.account.begin(self)

    def take(self, size: int) -> bool:
        if not self.account.take(size):
            return False
        self.reserved += size
        return True

    def pace(self) -> float:
        return self.speed

    def give_up(self, error: OverloadedError) -> None:
        self.given_up = error
        self.account.release(self.reserved)
        self.account.end(self)
        self.reserved = 0


def accounts(budget: BodyBudget, count: int) -> list[Account]:
    return [budget.account(f"10.0.0.{i}:1000") for i in range(count)]


def test_one_address_alone_may_have_all_of_it_and_what_is_announced_takes_nothing() -> None:
    budget = BodyBudget(MAX)
    (lone,) = accounts(budget, 1)
    assert lone.will_have_room(MAX) and budget.size == 0
    body = Body(lone)
    assert body.take(MAX) and lone.size == budget.size == MAX
    assert not Body(lone).take(1) and body.given_up is None
    assert budget.quick_max == MAX  # nobody waits whom it would help
    lone.release(MAX)
    body.account.end(body)
    body.account.end(body)
    assert (budget.size, budget.holder_count, budget.coming_count, lone.size) == (0, 0, 1, 0)


def test_connections_of_one_address_have_one_account_that_lasts_as_long_as_they() -> None:
    budget = BodyBudget(MAX)
    first, second = budget.account("10.0.0.1:1000"), budget.account("10.0.0.1:2000")
    assert first is second and first is not budget.account("10.0.0.2:1000")
    first.take(10)
    del first, second
    gc.collect()
    assert budget.account("10.0.0.1:3000").size == 0


def test_an_address_within_its_share_gets_room_from_the_slowest_body_of_one_that_is_over() -> None:
    budget = BodyBudget(MAX)
    fat, thin = accounts(budget, 2)
    bodies = [Body(fat, speed=speed) for speed in (3.0, 1.0, 2.0)]
    assert all(body.take(2000) for body in bodies)
    assert thin.will_have_room(500) and not any(body.given_up for body in bodies)
    assert Body(thin).take(500)
    assert [body.given_up is not None for body in bodies] == [False, True, False]
    assert bodies[1].given_up is not None and bodies[1].given_up.detail["reason"] == "body budget"
    assert bodies[1].given_up.headers == {"Retry-After": "1"}
    assert budget.size == 4500 and budget.quick_max == MAX


def test_no_more_is_given_up_than_brings_the_others_to_their_share() -> None:
    budget = BodyBudget(MAX)
    fat, thin = accounts(budget, 2)
    bodies = [Body(fat) for _ in range(64)]
    assert all(body.take(100) for body in bodies)
    greedy = Body(thin)
    while greedy.take(100):
        pass
    assert thin.size <= MAX // 2
    assert fat.size >= MAX // 2 - 100 - SPARE


def test_complete_bodies_are_never_given_up_but_nobody_takes_more_than_a_share_while_another_waits() -> None:
    clock = Clock()
    budget = BodyBudget(MAX, clock)
    fat, thin = accounts(budget, 2)
    assert fat.take(MAX)
    for i in range(64):
        fat.keep(i, 100)
    assert not thin.take(100) and budget.quick_max == 0
    for i in range(4):  # four are answered
        fat.forget(i)
        budget.release(100)
    assert not budget.reserve_quick(1)  # so that it is looked at
    assert not fat.take(100) and not fat.will_have_room(100)
    assert thin.take(100) and budget.quick_max == MAX
    assert fat.take(100)


def test_waiting_ends_by_itself() -> None:
    clock = Clock()
    budget = BodyBudget(MAX, clock)
    fat, thin = accounts(budget, 2)
    assert fat.take(MAX) and not thin.take(1)
    budget.release(100)
    fat.keep("", 100)
    fat.forget("")
    assert not fat.take(1)
    clock.now = WAIT_S + 1
    assert fat.take(1) and budget.quick_max == MAX


def test_however_many_addresses_wait_the_list_is_short() -> None:
    budget = BodyBudget(MAX)
    everybody = accounts(budget, WAITING_COUNT_MAX + 50)
    assert budget.account("fat:1") is not None
    fat = budget.account("fat:1")
    assert fat.take(MAX)
    assert not any(each.take(1) for each in everybody)
    assert len(budget._waiting) == WAITING_COUNT_MAX


def test_what_is_in_nobodys_name_counts_and_gets_room_too() -> None:
    budget = BodyBudget(MAX)
    (fat,) = accounts(budget, 1)
    body = Body(fat)
    assert budget.reserve(400) and body.take(6000)
    assert budget.reserve(100) and body.given_up is not None
    assert budget.size == 500
    assert not budget.reserve(MAX)


def test_what_is_in_memory_anyhow_is_counted_and_then_judged() -> None:
    budget = BodyBudget(MAX)
    fat, thin = accounts(budget, 2)
    fat.charge(MAX)
    assert budget.has_room(fat, 0)
    fat.charge(1)
    assert not budget.has_room(fat, 0) and budget.size == MAX + 1
    fat.release(MAX + 1)
    body = Body(fat)
    assert body.take(MAX)
    thin.charge(100)
    assert budget.has_room(thin, 0) and body.given_up is not None


@pytest.mark.parametrize(
    ("client", "address"),
    [
        ("127.0.0.1:43090", "127.0.0.1"),
        ("unix", "unix"),
        ("unix:", "unix"),
        ("[::ffff:10.0.0.1]:80", "10.0.0.1"),
        ("[fe80::1%eth0]:80", "[fe80000000000000]"),
        ("[2001:db8:0:1::1]:80", "[20010db800000001]"),
        ("[2001:db8:0:1:ffff::]:81", "[20010db800000001]"),
        ("", ""),
    ],
)
def test_address_of_a_client(client: str, address: str) -> None:
    assert address_of(client) == address
