"""When a server that died is started again: counted, with a clock that is set."""

from __future__ import annotations

import random

from pyserve.server.restarts import (
    BACKOFF_MAX_S,
    HEALTHY_AFTER_S,
    NAMED_CAUSE_MAX_S,
    SERVED_BACKOFF_MAX_S,
    NamedCauses,
    ServerBackoff,
)


def test_a_server_that_served_is_started_again_within_a_second_however_often_it_dies(seed: int) -> None:
    backoff = ServerBackoff(random.Random(seed))
    delays = [backoff.delay_s(1.0) for _ in range(2000)]
    assert delays[0] == 0.0
    assert max(delays) <= SERVED_BACKOFF_MAX_S < 1.0
    for number, delay_s in enumerate(delays[1:20]):
        longest = min(SERVED_BACKOFF_MAX_S, 0.2 * 2**number)
        assert longest / 2 <= delay_s <= longest
    assert len(set(delays[100:])) > 1
    assert backoff.delay_s(HEALTHY_AFTER_S) == 0.0
    assert backoff.delay_s(1.0) <= 0.2
    assert backoff.count == 2002


def test_one_that_is_never_ready_is_started_ever_more_slowly_until_one_serves(seed: int) -> None:
    backoff = ServerBackoff(random.Random(seed))
    assert backoff.delay_s(1.0) == 0.0
    delays = [backoff.delay_s(None) for _ in range(2000)]
    for number, delay_s in enumerate(delays[:20]):
        longest = min(BACKOFF_MAX_S, 0.2 * 2**number)
        assert longest / 2 <= delay_s <= longest
    assert max(delays) <= BACKOFF_MAX_S
    assert backoff.delay_s(1.0) <= SERVED_BACKOFF_MAX_S
    assert backoff.delay_s(None) <= 0.2


def test_a_cause_that_is_named_again_and_again_ends_the_restarts(seed: int) -> None:
    now = [1000.0]
    causes, backoff = NamedCauses(lambda: now[0]), ServerBackoff(random.Random(seed))
    count = 1
    while not causes.is_hopeless():
        now[0] += backoff.delay_s(None)
        count += 1
    assert 25 <= count <= 80
    assert NAMED_CAUSE_MAX_S <= now[0] - 1000.0 <= NAMED_CAUSE_MAX_S + BACKOFF_MAX_S
    causes.served()
    assert not causes.is_hopeless(), "one that served in between begins anew"
