"""Batches on an accelerator: right answers however long copies and operators take, and whatever overtakes whatever."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.lane_bench import LaneBench
from tests.support.networks import Identity, NamedOutputs, Outputs, save_script

WIDTH = 1024
EXAMPLE = [torch.zeros(1, WIDTH)]
MakeBench = Callable[..., LaneBench]


class Wide(nn.Module):
    """[n, 1024] -> [n, 1024]: several operators in a row, and a row that no other row's answer is like."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 16)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return torch.relu(self.b(torch.relu(self.a(x)))) + x


@pytest.fixture
def bench(simdev: Any, tmp_path: Path) -> Iterator[MakeBench]:
    made: list[LaneBench] = []

    def make(network: nn.Module, example: list[torch.Tensor] | None = None, **options: Any) -> LaneBench:
        path = save_script(network, tmp_path / f"{len(made)}.pt")
        made.append(LaneBench(path, EXAMPLE if example is None else example, **{"device": "simdev:0"} | options))
        return made[-1]

    yield make
    simdev.reset()  # nothing that a lane waits for hangs any more
    for each in made:
        each.close()


def items(count: int, seed: int = 5, width: int = WIDTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, width, generator=generator) for _ in range(count)]


def check(lane: LaneBench, network: nn.Module, xs: list[torch.Tensor], wave: int = 0) -> None:
    """Asks for all of them, ``wave`` at a time, and compares each answer."""
    with torch.inference_mode():
        expected = network(torch.cat(xs))
    for i, x in enumerate(xs):
        lane.submit(i, x)
        if wave and i % wave == wave - 1:
            lane.wait_for(i + 1)
    lane.wait_for(len(xs))
    wrong = [i for i in range(len(xs)) if not _is_close(lane.answers[i], expected[i])]
    assert not wrong, f"{len(wrong)} of {len(xs)} answers are wrong: {wrong[:10]}"


def _is_close(got: Any, expected: torch.Tensor) -> bool:
    return isinstance(got, torch.Tensor) and torch.allclose(got, expected, atol=1e-4, rtol=1e-4)


# --- one thing is slow ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["h2d", "op", "d2h", "d2d", "event"])
@pytest.mark.parametrize("count", [4, 13], ids=["one batch", "a rest"])
def test_answers_are_right_when_something_is_slow(simdev: Any, bench: MakeBench, kind: str, count: int) -> None:
    network = Wide()
    lane = bench(network, batch=4)
    check(lane, network, items(8))  # what runs for the first time waits
    lane.forget()
    simdev.fault(f"delay kind={kind} us=4000")
    check(lane, network, items(count, seed=6))


def test_a_buffer_is_filled_again_only_when_its_copy_is_over(simdev: Any, bench: MakeBench) -> None:
    """An identity answers what was copied: a buffer that is filled too early shows a later request's number."""
    lane = bench(Identity(), batch=4)
    simdev.fault("delay kind=h2d us=3000")
    for i in range(64):
        lane.submit(i, torch.full((1, WIDTH), float(i)))
    lane.wait_for(64)
    assert [i for i in range(64) if not bool((lane.answers[i] == i).all())] == []


def test_an_answer_is_not_changed_by_later_batches(simdev: Any, bench: MakeBench) -> None:
    """What was drained belongs to the client: it still is what it was when many more batches have come and gone."""
    lane = bench(Identity(), batch=4)
    for i in range(64):
        lane.submit(i, torch.full((1, WIDTH), float(i)))
        if i % 16 == 15:
            lane.wait_for(i + 1)
    assert [i for i in range(64) if not bool((lane.views[i] == i).all())] == []


# --- everything is slow at random -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("round", range(3))
def test_answers_are_right_under_random_delays(
    simdev: Any, bench: MakeBench, seed: int, workers: int, round: int
) -> None:
    network = Wide()
    lane = bench(network, batch=8, workers=workers, capacity=4096)
    simdev.fault(f"random seed={seed * 100 + round} max_us=1500")
    check(lane, network, items(300, seed=round), wave=37)


def test_limits_may_change_under_random_delays(simdev: Any, bench: MakeBench, seed: int) -> None:
    rng, network, xs = random.Random(seed), Wide(), items(400)
    lane = bench(network, batch=4, workers=1, capacity=4096)
    simdev.fault(f"random seed={seed} max_us=800")
    with torch.inference_mode():
        expected = network(torch.cat(xs))
    for i, x in enumerate(xs):
        lane.submit(i, x)
        if i % 80 == 0:
            lane.lane.set_workers(rng.choice([1, 3, 2]))
        if i % 50 == 0:
            lane.limits(batch=rng.randint(1, 9), running=rng.randint(1, 4))
        if i % 60 == 59:
            lane.wait(lambda: lane.lane.queue_size < 20)
    lane.wait_for(len(xs))
    assert [i for i in range(len(xs)) if not _is_close(lane.answers[i], expected[i])] == []


def test_two_devices_do_not_mix_under_random_delays(simdev: Any, bench: MakeBench, seed: int) -> None:
    networks, xs = [Wide(), Identity()], items(120)
    lanes = [bench(network, batch=4, device=f"simdev:{i}") for i, network in enumerate(networks)]
    simdev.fault(f"random seed={seed} max_us=1000")
    with torch.inference_mode():
        expected = [network(torch.cat(xs)) for network in networks]
    for i, x in enumerate(xs):
        for lane in lanes:
            lane.submit(i, x)
    for lane, wanted in zip(lanes, expected, strict=True):
        lane.wait_for(len(xs))
        assert [i for i in range(len(xs)) if not _is_close(lane.answers[i], wanted[i])] == []


@pytest.mark.parametrize("network", [Outputs(), NamedOutputs()], ids=["tuple", "dict"])
def test_several_outputs_are_right_under_random_delays(
    simdev: Any, bench: MakeBench, seed: int, network: nn.Module
) -> None:
    lane, xs = bench(network, batch=4), items(100)
    simdev.fault(f"random seed={seed} max_us=1500")
    for i, x in enumerate(xs):
        lane.submit(i, x)
    lane.wait_for(len(xs))
    for i, x in enumerate(xs):
        answer = lane.answers[i]
        plus, total = answer.values() if isinstance(answer, dict) else answer
        assert torch.equal(plus, x[0] + 1)
        torch.testing.assert_close(total, x.sum(), atol=1e-3, rtol=1e-3)


# --- the way they take ------------------------------------------------------------------------------------------------


def test_no_batch_of_the_examples_size_takes_pageable_memory(simdev: Any, bench: MakeBench) -> None:
    network = Wide()
    lane = bench(network, batch=4, workers=2)
    check(lane, network, items(32))
    lane.forget()
    before = simdev.counters()
    check(lane, network, items(64, seed=6))
    after = simdev.counters()
    assert after["pageable_h2d"] == before["pageable_h2d"]
    assert after["pageable_d2h"] == before["pageable_d2h"]


def test_a_batch_is_copied_while_another_runs(simdev: Any, bench: MakeBench) -> None:
    network = Wide()
    lane = bench(network, batch=4)
    check(lane, network, items(16))
    lane.forget()
    for kind, us in (("h2d", 2000), ("op", 1000)):
        simdev.fault(f"delay kind={kind} us={us}")
    before = simdev.counters()["overlaps"]
    check(lane, network, items(64, seed=6))
    assert simdev.counters()["overlaps"] > before
