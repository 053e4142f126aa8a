"""oneDNN's layout behind the first requests: loaded plainly first, proven like at a later start, exchanged or left."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyserve import _core
from pyserve.archive.archive import open_archive
from pyserve.archive.model_config import ModelConfig
from pyserve.backends.shown import shown
from pyserve.errors import ModelLoadError
from pyserve.lanes.network import Network
from pyserve.models import engine_choice, later_layout, loader
from pyserve.models.engine_choice import EngineChoice
from pyserve.models.later_layout import IN_LAYOUT, LATER, load_in_layout
from pyserve.models.loader import load_network
from tests.support.lane_stand import Stand, run, standing
from tests.support.networks import Times, save_script
from tests.support.packing import pack

CONVOLVES = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(self.conv(x).relu().mean((2, 3)))
"""
PLAIN = CONVOLVES.replace("self.conv(x)", "x.repeat(1, 3, 1, 1)[:, :8]")
CONFIG = "input: {dtype: float32, shape: [3, 8, 8]}\nbatchSize: 4\n"


def archive_of(folder: Path, code: str) -> Path:
    scope: dict[str, Any] = {}
    exec(code, scope)
    return pack(folder, model_code=code, state=scope["Net"]().state_dict(), config=CONFIG)


def load(path: Path, *, defers: bool = True) -> Network:
    with open_archive(path) as archive:
        return load_network(
            archive, name="m", devices=["cpu"], batch_size=4, cpu_budget=1, limit_max_image_pixels=True,
            startup_timeout_s=600, progress=lambda text: None, backend="torchscript",
            defers=defers,
        )  # fmt: skip


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any model counts as one that takes long."""
    monkeypatch.setattr(loader, "LATER_MIN_S", 0.0)
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("large")
def test_one_whose_calls_leave_traces_has_no_other_layout_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(model: Any, example: Any, *, is_package: bool, unchanged: int) -> None:
        assert not is_package and unchanged == model.checksum() != 0  # it has run meanwhile, without a change
        model.note_state("a call changes a weight")

    monkeypatch.setattr(loader, "find_state", find)
    network = load(archive_of(tmp_path, CONVOLVES))
    assert network.in_layout is None and "optimization" not in network.findings
    assert network.findings["state"] == "a call changes a weight"


@pytest.mark.usefixtures("large")
def test_the_first_start_is_plain_and_later_ones_are_in_layout(tmp_path: Path) -> None:
    path = archive_of(tmp_path, CONVOLVES)
    first = load(path)
    assert not first.torch_model.is_optimized and first.findings["optimization"] == LATER
    assert first.batches is not None
    first.batches.extend(4)  # as far as it was not done in the time that it has before READY
    found, note = load_in_layout(first, 4, 1)
    assert found is not None and note == IN_LAYOUT
    assert found.torch_model.is_optimized and found.in_layout is None
    assert found.batches is not None and found.batches.size_max == 4
    inputs = [torch.randn(4, 3, 8, 8)]
    torch.testing.assert_close(found.run(inputs), first.run(inputs), rtol=1e-4, atol=1e-5)
    second = load(path)
    assert second.torch_model.is_optimized and second.in_layout is None
    assert second.findings["optimization"] == IN_LAYOUT


@pytest.mark.usefixtures("large")
def test_a_network_without_convolutions_stays_and_nothing_is_said(tmp_path: Path) -> None:
    network = load(archive_of(tmp_path, PLAIN))
    assert load_in_layout(network, 4, 1) == (None, "")


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("proof", "answer", "reason"),
    [
        ("prove_optimization", "zeros", "it changes what is computed for zeros"),
        ("find_state", None, "a call changes a weight"),
    ],
)
def test_it_is_left_out_where_it_cannot_be_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proof: str, answer: str | None, reason: str
) -> None:
    network = load(archive_of(tmp_path, CONVOLVES))

    def prove(model: Any, *_: Any, **__: Any) -> Any:
        if answer is None:
            model.note_state("a call changes a weight")
        return answer

    monkeypatch.setattr(later_layout, proof, prove)
    found, note = load_in_layout(network, 4, 1)
    assert found is None and note == f"left out: {reason}"


@pytest.mark.usefixtures("large")
def test_fewer_rows_in_a_batch_are_no_gain(tmp_path: Path) -> None:
    network = load(archive_of(tmp_path, CONVOLVES))
    assert network.batches is not None
    looked = replace(network.batches, look=lambda: "its forward looks at its batch", _has_looked=False)
    network.batches.extend(4)
    network = replace(network, batches=replace(looked, size_max=4))
    found, note = load_in_layout(network, 4, 1)
    assert found is None and note.startswith("left out: runs one item per batch")


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("is_small", [True, False])
def test_a_small_model_and_one_that_is_measured_are_in_layout_from_the_first_load_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_small: bool
) -> None:
    if is_small:
        monkeypatch.setattr(loader, "LATER_MIN_S", 3600.0)
    network = load(archive_of(tmp_path, CONVOLVES), defers=is_small)
    assert network.torch_model.is_optimized and network.in_layout is None


# --- behind the first requests ----------------------------------------------------------------------------------------


def with_layout(stand: Stand, path: Path, factor: float) -> Network:
    """The lane's network, which has another to be loaded."""
    script = str(save_script(Times(factor), path / "layout.pt"))
    network = stand.lane.network
    network.in_layout = partial(_core.TorchModel.load, script, network.example)
    network.findings |= {"backend": shown("torchscript", "as 'backend: torchscript' says"), "optimization": LATER}
    return network


def choice_of(stand: Stand) -> EngineChoice:
    archive: Any = SimpleNamespace(config=ModelConfig(backend="torchscript"))
    return EngineChoice(stand.services, archive, stand.lane)


async def served(stand: Stand) -> float:
    return float(json.loads(bytes((await stand.answer(1.0)).body))[0])


@pytest.mark.parametrize("note", ["left out: it changes what is computed for zeros", IN_LAYOUT])
def test_workers_take_it_if_it_may_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: str) -> None:
    def load_it(network: Network, batch_size: int, threads: int) -> tuple[Network | None, str]:
        assert network.in_layout is not None
        made = replace(network, torch_model=network.in_layout(), in_layout=None, findings=dict(network.findings))
        return (made if note == IN_LAYOUT else None), note

    async def test() -> None:
        monkeypatch.setattr(engine_choice, "load_in_layout", load_it)
        async with standing(tmp_path, Times(2.0), workers=2) as stand:
            with_layout(stand, tmp_path, 3.0)
            choice = choice_of(stand)
            choice.start()
            assert await served(stand) in (2.0, 3.0)  # answered meanwhile
            await stand.until(lambda: stand.lane.network.findings["optimization"] == note)
            assert await served(stand) == (3.0 if note == IN_LAYOUT else 2.0)
            assert stand.lane.network.in_layout is None
            assert stand.lane.network.findings["backend"]["state"] == "settled"
            await choice.stop()

    run(test())


def test_weights_that_are_gone_leave_it_as_it_is(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            network = with_layout(stand, tmp_path, 3.0)

            def gone() -> Any:
                raise ModelLoadError("m: its weights cannot be loaded: the file is not there any more")

            network.in_layout = gone
            choice = choice_of(stand)
            choice.start()
            await stand.until(lambda: network.findings["optimization"] != LATER)
            assert "the file is not there any more" in network.findings["optimization"]
            assert await served(stand) == 2.0
            await choice.stop()

    run(test())


def test_unregistering_ends_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            network = with_layout(stand, tmp_path, 3.0)
            async with stand.services.laying_out:  # another model's turn
                choice = choice_of(stand)
                choice.start()
                await asyncio.sleep(0)
                await choice.stop()
            assert stand.lane.network is network and await served(stand) == 2.0

    run(test())
