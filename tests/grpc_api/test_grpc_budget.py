"""Messages of gRPC in the budget of bodies: the same shares of addresses as over HTTP."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from pyserve.errors import OverloadedError
from pyserve.grpc_api.service import Dispatcher, Service
from pyserve.grpc_api.status import code_of
from pyserve.request.body_budget import QUICK_SIZE_MAX, BodyBudget

MAX = 10 * QUICK_SIZE_MAX
SERVICE = Service("s", (), cast(Any, code_of), scope="inference")
HEALTH = Service("health", (), cast(Any, code_of))


def dispatcher_of(budget: BodyBudget) -> Dispatcher:
    services = SimpleNamespace(config=SimpleNamespace(max_request_size=MAX))
    return Dispatcher(cast(Any, services), budget, cast(Any, None))


def call(address: str) -> Any:
    return SimpleNamespace(client=f"{address}:1000")


def test_large_messages_are_in_the_account_of_their_address_and_small_ones_in_nobodys() -> None:
    budget = BodyBudget(MAX)
    dispatcher = dispatcher_of(budget)
    large = dispatcher.begin(call("10.0.0.1"), QUICK_SIZE_MAX + 1)
    small = dispatcher.begin(call("10.0.0.1"), 100)
    account = budget.account("10.0.0.1:2000")
    assert large is account and small is budget
    assert (account.size, budget.size) == (QUICK_SIZE_MAX + 1, QUICK_SIZE_MAX + 101)
    dispatcher.end(large, QUICK_SIZE_MAX + 1)
    dispatcher.end(small, 100)
    assert (account.size, budget.size, budget.holder_count) == (0, 0, 0)


def test_a_message_over_the_budget_is_refused_and_health_is_not() -> None:
    budget = BodyBudget(MAX)
    dispatcher = dispatcher_of(budget)
    dispatcher.begin(call("10.0.0.1"), MAX)
    dispatcher._check_room(call("10.0.0.1"), SERVICE)
    dispatcher.begin(call("10.0.0.2"), 1)
    with pytest.raises(OverloadedError) as raised:
        dispatcher._check_room(call("10.0.0.2"), SERVICE)
    assert raised.value.detail["reason"] == "body budget"
    dispatcher._check_room(call("10.0.0.2"), HEALTH)


def test_while_another_address_waits_nobody_has_more_than_a_share() -> None:
    budget = BodyBudget(MAX)
    dispatcher = dispatcher_of(budget)
    pieces = [dispatcher.begin(call("10.0.0.1"), MAX // 5) for _ in range(5)]
    dispatcher.begin(call("10.0.0.2"), 1)
    with pytest.raises(OverloadedError):
        dispatcher._check_room(call("10.0.0.2"), SERVICE)
    dispatcher.end(budget, 1)
    dispatcher.end(pieces[0], MAX // 5)
    dispatcher.begin(call("10.0.0.1"), MAX // 5)
    with pytest.raises(OverloadedError):  # there is room, and it is not for this one
        dispatcher._check_room(call("10.0.0.1"), SERVICE)
