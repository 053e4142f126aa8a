"""Two batches on a device at any time: when the second is taken, what overlaps, what is counted, what goes wrong."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyserve import _core
from tests.simdev.flow import Doubled, Wide, ask, items, keep_busy, saved, wrong
from tests.support.lane_bench import LaneBench

DEVICE = "simdev:0"
KIND, BEGIN, END = 2, 4, 5  # of a span


def spans_of(simdev: Any, kind: str) -> list[Any]:
    return [span for span in simdev.take_spans() if span[KIND] == kind]


def test_one_batch_goes_up_while_another_is_computed_with_no_more_clients_than_a_batch_has(
    simdev: Any, tmp_path: Path
) -> None:
    """As many clients as a batch has places: the second batch is never full."""
    network = Wide().eval()
    lane = LaneBench(saved(network, tmp_path), [torch.zeros(1, 64)], batch=8, device=DEVICE)
    xs = items(400)
    keep_busy(lane, xs[:100], clients=8)
    lane.forget()
    simdev.fault("delay kind=op us=3000")
    simdev.fault("delay kind=h2d us=2000")
    simdev.trace(True)
    keep_busy(lane, xs, clients=8)
    simdev.trace(False)
    spans = simdev.take_spans()
    ups = [span for span in spans if span[KIND] == "h2d"]
    operators = [span for span in spans if span[KIND] == "op"]
    under = sum(any(op[BEGIN] < up[END] and up[BEGIN] < op[END] for op in operators) for up in ups)
    assert wrong(lane, network, xs) == []
    assert under > len(ups) / 2, f"{under} of {len(ups)} copies were under an operator"
    assert lane.lane.stats()["overlapped"] > len(ups) / 2
    lane.close()


def test_a_batch_grows_while_the_device_is_busy(simdev: Any, tmp_path: Path) -> None:
    """Those that come while one is computed are one batch: none is taken with the first of them."""
    network = Wide().eval()
    lane = LaneBench(saved(network, tmp_path), [torch.zeros(1, 64)], batch=32, device=DEVICE)
    simdev.fault("delay kind=op us=20000")
    xs = items(10)
    rounds: list[int] = []
    while rounds.count(2) < 3 and len(rounds) < 60:  # a busy machine may be later than the device
        lane.forget()
        ticket = lane.submit(0, xs[0])
        lane.wait(lambda ticket=ticket: lane.lane.started_at(ticket) != 0)  # type: ignore[misc]
        for i, x in enumerate(xs[1:], start=1):
            lane.submit(i, x)
            time.sleep(0.001)
        lane.wait_for(len(xs))
        assert wrong(lane, network, xs) == []
        rounds.append(len(lane.completions))
    assert rounds.count(2) == 3, rounds  # what a batch takes is not known in the first
    lane.close()


def test_a_batch_counts_its_own_time_only(simdev: Any, tmp_path: Path) -> None:
    """Two are on the device, but it computes one at a time: together they cannot have taken longer than the clock."""
    network = Wide().eval()
    lane = LaneBench(saved(network, tmp_path), [torch.zeros(1, 64)], batch=4, device=DEVICE)
    ask(lane, network, items(16))
    lane.forget()
    for kind in ("op", "h2d", "d2h"):
        simdev.fault(f"delay kind={kind} us=2000")
    before, began = lane.lane.stats(), time.monotonic()
    assert ask(lane, network, items(100)) == []
    took, after = time.monotonic() - began, lane.lane.stats()
    batches = after["batches"] - before["batches"]

    def spent(name: str) -> float:
        return after[name][2] - before[name][2]

    assert 0.002 * batches <= spent("compute") <= took
    assert spent("h2d") >= 0.002 * batches and spent("d2h") >= 0.002 * batches
    assert spent("inference") == pytest.approx(spent("compute") + spent("d2h"), rel=0.01)
    assert spent("staging") >= spent("h2d")
    for completion in lane.completions:
        assert completion.started_at <= completion.staged_at <= completion.finished_at
    lane.close()


def test_groups_of_several_shapes_are_on_the_device_together(simdev: Any, tmp_path: Path) -> None:
    network = Doubled().eval()
    lane = LaneBench(saved(network, tmp_path), [torch.zeros(1, 16)], batch=6, device=DEVICE)
    xs = [items(1, 16 + i % 6, seed=i)[0] for i in range(60)]
    ask(lane, network, xs)
    before = lane.lane.stats()["overlapped"]
    lane.forget()
    lane.hold(6)
    simdev.fault("delay kind=op us=2000")
    for first in range(0, 60, 6):  # a take of six shapes each
        for i in range(first, first + 6):
            lane.submit(i, xs[i])
        lane.wait_for(first + 6)
    assert wrong(lane, network, xs) == []
    assert lane.lane.stats()["overlapped"] - before >= 10 * 5
    lane.close()


def test_the_batch_size_may_change_under_load(simdev: Any, tmp_path: Path) -> None:
    """Larger slots are had while batches are on their way; after smaller ones page-locked memory is given back."""
    network = Doubled().eval()
    lane = LaneBench(saved(network, tmp_path), [torch.zeros(1, 2048)], batch=4, device=DEVICE)
    simdev.fault("random seed=9 max_us=1500")
    xs = items(900, 2048)
    sizes = deque([4, 32, 2, 64, 8])
    held = []
    for i, x in enumerate(xs):
        lane.submit(i, x)
        if i % 60 == 59:
            lane.wait_for(i - 20)
            held.append(lane.lane.stats()["pinned_bytes"])
            sizes.rotate(-1)
            lane.limits(batch=sizes[0])
    lane.wait_for(len(xs))
    assert wrong(lane, network, xs) == []
    assert lane.lane.stats()["pageable_copies"] == 0
    lane.limits(batch=64)
    lane.forget()
    ask(lane, network, xs[:300])
    large, pinned = lane.lane.stats()["pinned_bytes"], simdev.counters()["pinned"]
    lane.limits(batch=1)
    lane.forget()
    ask(lane, network, xs[:30])
    assert lane.lane.stats()["pinned_bytes"] < large
    assert simdev.counters()["pinned"] < pinned  # not only put aside
    lane.close()


class Counting(nn.Module):
    """Writes to its input by several operators, and fails for items of 33 when it has begun."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x.add_(1)
        if x.size(1) == 33:
            raise RuntimeError("not 33")
        return x * 2


def test_what_a_failed_batch_left_behind_does_not_reach_the_next(simdev: Any, tmp_path: Path) -> None:
    """Its operators still wait in the queue, and write to the memory of the slot. There are three."""
    lane = LaneBench(saved(Counting(), tmp_path), [torch.zeros(1, 64)], device=DEVICE)
    good, bad = items(40, 32), items(1, 33)[0]
    lane.submit("first", bad)  # from the second time on its operators are queued
    lane.submit("good", good[0])
    lane.wait_for(2)
    simdev.fault("delay kind=op us=1500")
    for i, x in enumerate(good):
        for failing in range(3):
            lane.submit((i, failing), bad)
        lane.submit(i, x)
    lane.wait_for(2 + 4 * len(good))
    for i, x in enumerate(good):
        assert torch.allclose(lane.answers[i], (x[0] + 6) * 2), i
        assert [lane.answers[i, failing] for failing in range(3)] == ["model_error"] * 3
    lane.close()


class Endless(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        while x.size(1) == 7 and float(y.sum()) < 1e30:
            y = y * 1
        return y


def test_an_interruption_ends_the_batch_that_takes_too_long_and_no_other(simdev: Any, tmp_path: Path) -> None:
    lane = LaneBench(saved(Endless(), tmp_path), [torch.zeros(1, 16)], device=DEVICE)
    simdev.fault("delay kind=op us=20000")
    good = items(6, 16)
    for i, x in enumerate(good[:3]):
        lane.submit(i, x)
    lane.submit("endless", items(1, 7)[0])
    for i, x in enumerate(good[3:], start=3):
        lane.submit(i, x)
    seen = (0, 0.0)

    def interrupts() -> bool:
        nonlocal seen
        (row,) = lane.lane.workers()
        now = time.monotonic()
        if row["running_since"] != seen[0]:
            seen = (row["running_since"], now)
        elif seen[0] != 0 and now > seen[1] + 0.5:
            lane.lane.interrupt(row["id"], seen[0])
        return len(lane.answers) == 7

    lane.wait(interrupts)
    assert lane.answers["endless"] == "interrupted"
    for i, x in enumerate(good):
        assert torch.equal(lane.answers[i], x[0] * 2), i
    lane.close()


class Previous(nn.Module):
    """Keeps its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(1, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x + self.last  # type: ignore[has-type]
        self.last = x
        return out


def test_a_model_may_keep_its_input(simdev: Any, tmp_path: Path) -> None:
    lane = LaneBench(saved(Previous(), tmp_path), [torch.zeros(1, 64)], device=DEVICE)
    simdev.fault("random seed=2 max_us=1000")
    xs = items(40)
    for i, x in enumerate(xs):
        lane.submit(i, x)
    lane.wait_for(len(xs))
    for i, x in enumerate(xs[1:], start=1):
        assert torch.equal(lane.answers[i], (x + xs[i - 1])[0]), i
    lane.close()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_outputs_of_a_lower_precision_become_float_on_the_host(simdev: Any, tmp_path: Path, precision: str) -> None:
    path = saved(Wide(), tmp_path)
    lane = LaneBench(path, [torch.zeros(1, 64)], batch=4, device=DEVICE, model={"precision": precision})
    xs = items(40)
    ask(lane, Wide(), xs)
    lane.forget()
    before = simdev.counters()
    ask(lane, Wide(), xs)
    after = simdev.counters()
    assert after["d2h_bytes"] - before["d2h_bytes"] == 40 * 64 * 2
    alone = _core.TorchModel.load(str(path), [torch.zeros(1, 64)], device=DEVICE, precision=precision)
    for i, x in enumerate(xs):
        expected = alone.run([x.to(DEVICE)])
        assert expected.dtype == torch.float32 == lane.answers[i].dtype
        assert torch.allclose(lane.answers[i], expected.cpu()[0], atol=0.05)
    lane.close()
