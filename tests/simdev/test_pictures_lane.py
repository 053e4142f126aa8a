"""Pictures from a request to its answer on an accelerator, beside numbers that clients send, as a CPU answers them."""

from __future__ import annotations

import json
import random
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyserve.archive.archive import open_archive
from pyserve.config.config import Config
from pyserve.lanes.network import Network
from pyserve.lanes.settings import ModelSettings
from pyserve.models.loader import load_network
from tests.support.lane_stand import HANG_S, Stand, run
from tests.support.pictures import SEED, picture_file, picture_files
from tests.support.serving_models import write_torchscript

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")
SHAPE = (3, 224, 224)


class Classes(nn.Module):
    """Pictures -> scores of 12 classes, of which some are always equal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.head = nn.Conv2d(3, 8, 16, 16), nn.Linear(8 * 14 * 14, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.head(self.conv(x).flatten(1))
        return torch.cat([scores[:, :6], scores[:, :6]], 1)


class Segments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(3, 4, 32, 32)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.conv(x), "aux": x * 2}


def network_of(folder: Path, module: nn.Module, handler: str, device: str, **config: Any) -> Network:
    with open_archive(write_torchscript(folder, module, "m", handler=handler, config=config)) as archive:
        return load_network(
            archive, name="m", devices=[device], batch_size=8, cpu_budget=1, limit_max_image_pixels=True,
            startup_timeout_s=60, progress=lambda text: None,
        )  # fmt: skip


@asynccontextmanager
async def stand_of(network: Network) -> Any:
    stand = Stand(Path(), ModelSettings(batch_size=8, queue_size=1000), Config(), private=True, network=network)
    stand.lane.set_workers(2)
    assert await stand.lane.settled(HANG_S) == ""
    try:
        yield stand
    finally:
        await stand.end()


async def answers_of(network: Network, bodies: list[bytes | torch.Tensor]) -> list[Any]:
    """Of files, of numbers as JSON, and of tensors."""
    async with stand_of(network) as stand:
        exchanges = []
        for number, body in enumerate(bodies):
            if isinstance(body, torch.Tensor):
                exchanges.append(stand.post(id=f"r{number}", body=b"", inputs=[body]))
            else:
                headers = [("Content-Type", "application/json" if body[:1] == b"[" else "image/png")]
                exchanges.append(stand.post(id=f"r{number}", body=body, headers=headers))
        await stand.until(lambda: all(exchange.answered for exchange in exchanges))
        responses = [stand.answers[f"r{number}"] for number in range(len(bodies))]
        assert [response.status for response in responses] == [200] * len(bodies)
        return [json.loads(bytes(response.body)) for response in responses]


def close(left: Any, right: Any) -> bool:
    """Whether two answers have the same structure and names in the same order, and nearly the same numbers."""
    if isinstance(left, dict):
        return list(left) == list(right) and all(close(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(close, left, right))
    return bool(left == pytest.approx(right, abs=1e-5))


@pytest.mark.parametrize(("module", "handler"), [(Classes(), "image_classifier"), (Segments(), "image_segmenter")])
def test_pictures_and_numbers_are_answered_as_on_a_cpu(
    module: nn.Module, handler: str, tmp_path: Path, simdev: Any
) -> None:
    generator = torch.Generator().manual_seed(SEED)
    bodies: list[bytes | torch.Tensor] = list(picture_files())
    bodies += [torch.randn((1, *SHAPE), generator=generator) for _ in range(12)]
    bodies += [json.dumps(torch.randn(SHAPE, generator=generator).tolist()).encode() for _ in range(2)]
    random.Random(SEED).shuffle(bodies)
    on_cpu = network_of(tmp_path / "cpu", module, handler, "cpu")
    on_device = network_of(tmp_path / "device", module, handler, "simdev:0")
    assert on_cpu.pixels is None and on_cpu.finish is None and "pixels" not in on_cpu.findings
    assert on_device.findings["pixels"] == "bytes, normalized on the device: the same numbers"
    simdev.fault(f"random seed={SEED} max_us=300")
    found: list[list[Any]] = []

    async def ask() -> None:
        for network in (on_cpu, on_device):
            found.append(await answers_of(network, bodies))

    run(ask())
    assert all(close(left, right) for left, right in zip(*found, strict=True))


def test_picture_costs_a_quarter_of_the_bytes_on_the_way_up(tmp_path: Path, simdev: Any) -> None:
    network = network_of(tmp_path, Classes(), "image_classifier", "simdev:0")
    moved = []

    async def ask() -> None:
        async with stand_of(network) as stand:
            headers = [("Content-Type", "image/png")]
            for body, inputs in ((picture_file("RGB", (300, 300), 1), None), (b"", [torch.zeros(1, *SHAPE)])):
                before = simdev.counters()["h2d_bytes"]
                exchange = stand.post(body=body, headers=headers, inputs=inputs)
                await stand.until(lambda exchange=exchange: exchange.answered)
                moved.append(simdev.counters()["h2d_bytes"] - before)

    run(ask())
    assert moved == [3 * 224 * 224, 4 * 3 * 224 * 224]


def test_numbers_of_a_device_that_divides_otherwise_are_made_on_the_host(
    tmp_path: Path, simdev: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("pyserve.models.pixels.DIFFERENCE_MAX", -1.0)
    monkeypatch.setattr("pyserve.models.pixels.log.warning", lambda text, *values: warnings.append(text % values))
    network = network_of(tmp_path, Classes(), "image_classifier", "simdev:0")
    assert network.pixels is None and network.findings["pixels"].startswith("numbers: the device makes numbers")
    assert len(warnings) == 1 and "pictures are copied to simdev:0 as numbers" in warnings[0]
    assert network.handler.preprocess([{"body": picture_file("RGB", (30, 30), 1)}]).dtype is torch.float32


@pytest.mark.parametrize("config", [{"precision": "bf16"}, {"memoryFormat": "channels_last"}])
def test_pictures_for_another_precision_or_layout(config: dict[str, str], tmp_path: Path, simdev: Any) -> None:
    network = network_of(tmp_path, Classes(), "image_classifier", "simdev:0", **config)
    assert network.findings["memoryFormat"].startswith("channels_last")
    assert ("suits convolutions at bf16" in network.findings["memoryFormat"]) is ("precision" in config)
    files = [picture_file("RGB", (300, 300), number) for number in range(4)]
    pixels = torch.cat([network.handler.preprocess([{"body": file}]) for file in files])
    assert pixels.dtype is torch.uint8 and network.pixels is not None
    assert torch.equal(network.run([pixels]), network.run([network.pixels.numbers(pixels)]))
