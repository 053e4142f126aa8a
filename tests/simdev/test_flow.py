"""The way of a batch to a device and back: overlap, memory that is used again, answers under delays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.simdev.flow import Doubled, Wide, ask, items, saved, wrong
from tests.support.lane_bench import LaneBench

DEVICE = "simdev:0"


@pytest.fixture
def wide(simdev: Any, tmp_path: Path) -> Any:
    """A lane of one worker with batches of 4."""
    lane = LaneBench(saved(Wide(), tmp_path), [torch.zeros(1, 64)], batch=4, device=DEVICE)
    yield lane
    lane.close()


@pytest.mark.parametrize("kind", ["h2d", "op", "d2h", "event"])
def test_answers_are_right_when_the_device_is_late(simdev: Any, wide: LaneBench, kind: str) -> None:
    simdev.fault(f"delay kind={kind} us=3000")
    assert ask(wide, Wide().eval(), items(48)) == []


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_answers_are_right_under_random_delays(simdev: Any, tmp_path: Path, seed: int) -> None:
    """Shapes that cannot share a batch, sizes beyond the slot, two workers."""
    network = Doubled().eval()
    lane = LaneBench(saved(network, tmp_path), [torch.zeros(1, 16)], batch=8, workers=2, device=DEVICE)
    shapes = [(16,), (3, 5), (700,), (16,), (0,)]
    xs = [items(1, *shapes[i % 5], seed=i)[0] for i in range(400)]
    ask(lane, network, xs[:40])
    lane.answers.clear()
    simdev.fault(f"random seed={seed} max_us=2000")
    assert ask(lane, network, xs, wave=23) == []
    lane.close()


def test_nothing_is_allocated_and_nothing_is_pageable_after_the_warm_up(simdev: Any, wide: LaneBench) -> None:
    assert ask(wide, Wide().eval(), items(40)) == []  # outputs of two batches are held at once from here on
    before = simdev.counters()
    wide.answers.clear()
    assert ask(wide, Wide().eval(), items(200)) == []
    after = simdev.counters()
    for name in ("driver_allocations", "pinned_allocations", "pinned", "pageable_h2d", "pageable_d2h"):
        assert after[name] == before[name], name
    stats = wide.lane.stats()
    assert stats["pageable_copies"] == stats["staging_fallback"] == stats["slots_grown"] == 0
    assert stats["pinned_bytes"] > 0 and stats["slot_bytes"] > 0


def test_larger_items_make_the_slot_larger_once(simdev: Any, tmp_path: Path) -> None:
    network = Doubled().eval()
    lane = LaneBench(saved(network, tmp_path), [torch.zeros(1, 16)], batch=4, device=DEVICE)
    slot, before = lane.lane.stats()["slot_bytes"], simdev.counters()
    assert ask(lane, network, items(60, 4096)) == []
    stats, counters = lane.lane.stats(), simdev.counters()
    assert [counters[name] - before[name] for name in ("pageable_h2d", "pageable_d2h")] == [0, 0]
    assert 0 < stats["slots_grown"] <= 12 and stats["slot_bytes"] > slot
    lane.answers.clear()
    assert ask(lane, network, items(200, 4096)) == []
    assert lane.lane.stats()["slots_grown"] <= 12 and simdev.counters()["pinned"] == counters["pinned"]
    lane.close()


def test_without_page_locked_memory_it_is_slower_and_says_so(simdev: Any, tmp_path: Path) -> None:
    simdev.fault("pinned bytes=0")
    network, size = Doubled().eval(), 300_000  # more than what torch may have in its cache
    lane = LaneBench(saved(network, tmp_path), [torch.zeros(1, size)], batch=4, device=DEVICE)
    assert ask(lane, network, items(12, size)) == []
    stats = lane.lane.stats()
    assert stats["pinned_refused"] > 0 and stats["pageable_copies"] > 0 and stats["pinned_bytes"] == 0
    lane.close()


def test_an_answer_that_is_kept_is_not_written_to_by_later_batches(simdev: Any, tmp_path: Path) -> None:
    """The rows are views of what the worker handed out, as a slow reader has them; none of it is page-locked."""
    network = Wide().eval()
    lane = LaneBench(saved(network, tmp_path), [torch.zeros(1, 64)], batch=4, device=DEVICE)
    xs = items(1600)
    for i, x in enumerate(xs[:4]):
        lane.submit(i, x)
    lane.wait_for(4)
    kept = [completion.output for completion in lane.completions]
    count = sum(len(output) for output in kept)
    expected = torch.cat([output.clone() for output in kept])
    pinned = simdev.counters()["pinned"]
    for i, x in enumerate(xs[4:], start=4):
        lane.submit(i, x)
        if i % 100 == 0:
            lane.wait_for(i + 1)
    lane.wait_for(len(xs))
    assert count == 4 and torch.equal(torch.cat(kept), expected)
    assert wrong(lane, network, xs) == []
    assert simdev.counters()["pinned"] == pinned
    lane.close()
    assert lane.lane.stats()["pinned_bytes"] == lane.lane.stats()["slot_bytes"] == 0


class Same(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Turned(nn.Module):
    """A view of its input that is not dense."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.size(0), 8, 8).transpose(1, 2)


class Changed(nn.Module):
    """Writes to its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(3)
        return x.add_(1)


class Spread(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1].expand(x.size(0), 50)


class Bits(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x > 0


class Whole(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 1000).to(torch.int64)


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :0]


class Home(nn.Module):
    """Answers from the host."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2).cpu()


class Complex(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.complex(x, x + 1)


def answers_of(network: nn.Module, folder: Path, simdev: Any) -> list[tuple[torch.Tensor, Any]]:
    """Items, each with its row of the answer, from batches of mixed sizes under delays by chance."""
    lane = LaneBench(saved(network, folder), [torch.zeros(1, 64)], batch=4, device=DEVICE)
    simdev.fault("random seed=3 max_us=800")
    xs = items(40)
    for i, x in enumerate(xs):
        lane.submit(i, x)
    lane.wait_for(len(xs))
    lane.close()
    assert len(lane.answers) == len(xs)
    return [(x, lane.answers[i]) for i, x in enumerate(xs)]


@pytest.mark.parametrize("kind", [Same, Turned, Changed, Spread, Bits, Whole, Nothing, Home, Complex])
def test_outputs_of_every_kind_come_as_they_are(simdev: Any, tmp_path: Path, kind: type[nn.Module]) -> None:
    network = kind()
    for i, (x, got) in enumerate(answers_of(network, tmp_path, simdev)):
        expected = network(x.clone())[0]
        assert got.dtype == expected.dtype and torch.equal(got, expected), i


class Named(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"double": x * 2, "same": x, "sign": x > 0}


class Several(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x + 1, x, x * 2


@pytest.mark.parametrize("kind", [Named, Several])
def test_structures_of_outputs_keep_their_order(simdev: Any, tmp_path: Path, kind: type[nn.Module]) -> None:
    network = kind()
    for i, (x, got) in enumerate(answers_of(network, tmp_path, simdev)):
        expected = network(x)
        pairs = zip(*(each.values() if isinstance(each, dict) else each for each in (got, expected)), strict=True)
        assert len(got) == 3 and all(torch.equal(a, b[0]) for a, b in pairs), i
