"""What counts as a lie of health, and for how long: by hand-made probes."""

from __future__ import annotations

import pytest

from tests.chaos.fault import Death
from tests.chaos.health import INTERVAL_S, Probe, lies, longest_silence


def ping(at: float, is_well: bool = True) -> Probe:
    return Probe(at, at + 0.001, "/ping", is_well)


def described(at: float, *pids: int) -> Probe:
    return Probe(at, at + 0.001, "echo", True, frozenset(pids))


def longest(probes: list[Probe], *deaths: Death, is_harmless: bool = False, well_from: float = 100.0) -> float:
    told = lies(sorted(probes), deaths, begun_at=0.0, well_from=well_from, is_harmless=is_harmless)
    return max((lie.seconds for lie in told), default=0.0)


def test_a_dead_worker_that_is_shown_as_ready_is_a_lie_until_it_no_longer_is() -> None:
    probes = [described(0.9, 7, 8), described(1.02, 7, 8), described(1.05, 7, 8), described(1.08, 8)]
    assert longest(probes, Death(7, "echo", 1.0, was_last=False)) == pytest.approx(0.05)
    assert longest(probes, Death(7, "other", 1.0, was_last=False)) == 0.0


def test_healthy_without_a_worker_is_a_lie_until_ping_complains_or_another_worker_has_come() -> None:
    death = Death(7, "echo", 1.0, was_last=True)
    complains = [ping(0.9), ping(1.02), ping(1.04), ping(1.06, False), ping(1.3)]
    comes = [ping(0.9), ping(1.02), described(1.2, 9), ping(1.3)]
    assert longest(complains, death) == pytest.approx(0.04)
    assert longest(comes, death) == pytest.approx(0.02)
    assert longest(comes, death._replace(was_last=False)) == 0.0


def test_a_complaint_after_the_recovery_is_a_lie_as_long_as_it_lasts() -> None:
    probes = [ping(1.0, False), ping(2.0), ping(2.02, False), ping(2.04, False), ping(2.06)]
    assert longest(probes, well_from=1.9) == pytest.approx(0.021)
    assert longest(probes, well_from=3.0) == 0.0


def test_a_complaint_is_a_lie_while_nobody_misses_anything() -> None:
    probes = [ping(1.0), ping(1.02, False), ping(1.04)]
    assert longest(probes, is_harmless=True) == pytest.approx(0.001)
    assert longest(probes) == 0.0


def test_silence_is_the_time_between_two_answers() -> None:
    assert longest_silence([ping(1.0), ping(1.02), ping(2.0)], 1.0) == pytest.approx(0.98 - INTERVAL_S)
    assert longest_silence([ping(3.0)], 1.0) == pytest.approx(2.001 - INTERVAL_S)
    assert longest_silence([], 1.0) == 0.0
