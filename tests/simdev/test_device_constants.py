"""Models whose code names a device: traces of others' devices run, and what names one on purpose keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyserve import _core
from tests.support.networks import save_script

LENGTH, WORDS = 6, 50


class Text(nn.Module):
    """[n, length] -> [n, 3]: words and positions, as BERT has them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.words, self.places = nn.Embedding(WORDS, 16), nn.Embedding(32, 16)
            self.head = nn.Linear(16, 3)

    def forward(self, ids):  # type: ignore[no-untyped-def]
        at = torch.arange(ids.size(1), device=ids.device)
        mask = torch.ones(ids.shape, device=ids.device)
        return self.head(torch.tanh(self.words(ids) + self.places(at)) * mask.unsqueeze(-1)).mean(1)


class OnTheHost(nn.Module):
    """[n, 4] -> [n, 4]: scripted, with a step that its author wants on the CPU, in one of two ways."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 1e6:
            return x.to("cpu").sort(dim=1)[0].to(x.device)
        return (x * 2).to("cpu") + 1


class Asks(nn.Module):
    """[n, 4] -> [n, 4]: takes another way on the CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device == torch.device("cpu"):
            return x * 3
        return x * 3 + 0


class Keeps(nn.Module):
    """[n, 4] -> [n, 4]: has a device among its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.where = torch.device("cpu")
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + torch.arange(4, device=self.where)


def traced(network: nn.Module, example: torch.Tensor, path: Path) -> Path:
    with torch.no_grad():
        trace = torch.jit.trace(network.eval(), example, check_trace=False)
    torch.jit.save(trace.to("cpu"), str(path))  # its weights; what its code names stays
    return path


def ids(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_trace_made_on_the_cpu_runs_on_the_device(accelerator: str, tmp_path: Path, frozen: bool) -> None:
    network = Text().eval()
    path = traced(network, ids(1), tmp_path / "m.pt")
    if frozen:
        torch.jit.save(torch.jit.freeze(torch.jit.load(str(path))), str(path))
    model = _core.TorchModel.load(str(path), [ids(1)], device=accelerator)
    assert model.device_note == f"the devices that its code names became {accelerator}"
    with torch.no_grad():
        expected = network(ids(5))
    torch.testing.assert_close(model.run([ids(5).to(accelerator)]).cpu(), expected, atol=1e-3, rtol=1e-3)


def test_a_copy_on_another_device_names_that_one(simdev: Any, tmp_path: Path) -> None:
    network = Text().eval()
    model = _core.TorchModel.load(str(traced(network, ids(1), tmp_path / "m.pt")), [ids(1)], device="simdev:0")
    with torch.no_grad():
        expected = network(ids(5))
    torch.testing.assert_close(model.copy_on("simdev:1").run([ids(5).to("simdev:1")]).cpu(), expected)


@pytest.mark.parametrize("target", ["simdev:0", "simdev:1", "cpu"])
def test_a_trace_made_on_a_device_runs_on_others(simdev: Any, tmp_path: Path, target: str) -> None:
    network = Text().eval()
    there = network.to("simdev:1")
    path = traced(there, ids(1).to("simdev:1"), tmp_path / "m.pt")
    model = _core.TorchModel.load(str(path), [ids(1)], device=target)
    assert bool(model.device_note) is (target != "simdev:1")
    with torch.no_grad():
        expected = Text().eval()(ids(5))
    torch.testing.assert_close(model.run([ids(5).to(target)]).cpu(), expected, atol=1e-4, rtol=1e-4)


def test_a_trace_names_the_device_of_a_copy_though_it_was_made_on_the_models_own(simdev: Any, tmp_path: Path) -> None:
    path = traced(Text().eval().to("simdev:0"), ids(1).to("simdev:0"), tmp_path / "m.pt")
    model = _core.TorchModel.load(str(path), [ids(1)], device="simdev:0")
    assert model.device_note == ""
    with torch.no_grad():
        expected = Text().eval()(ids(5))
    torch.testing.assert_close(model.copy_on("simdev:1").run([ids(5).to("simdev:1")]).cpu(), expected)


def test_a_script_that_names_the_cpu_and_runs_is_left_as_it_is(accelerator: str, tmp_path: Path) -> None:
    path = save_script(OnTheHost(), tmp_path / "m.pt")
    x = torch.randn(3, 4)
    model = _core.TorchModel.load(str(path), [x[:1]], device=accelerator)
    assert model.device_note == ""
    got = model.run([x.to(accelerator)])
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, x * 2 + 1)


def test_a_device_that_is_only_compared_is_left_as_it_is(accelerator: str, tmp_path: Path) -> None:
    model = _core.TorchModel.load(str(save_script(Asks(), tmp_path / "m.pt")), [torch.zeros(1, 4)], device=accelerator)
    assert model.device_note == ""
    torch.testing.assert_close(model.run([torch.ones(2, 4).to(accelerator)]).cpu(), torch.full((2, 4), 3.0))


def test_a_device_among_the_attributes_is_renamed_where_it_would_fail(accelerator: str, tmp_path: Path) -> None:
    model = _core.TorchModel.load(str(save_script(Keeps(), tmp_path / "m.pt")), [torch.zeros(1, 4)], device=accelerator)
    assert model.device_note
    torch.testing.assert_close(model.run([torch.ones(2, 4).to(accelerator)]).cpu(), 1 + torch.arange(4.0).expand(2, 4))


def test_on_the_cpu_nothing_is_renamed(tmp_path: Path) -> None:
    for network in (OnTheHost(), Asks(), Keeps()):
        model = _core.TorchModel.load(str(save_script(network, tmp_path / "m.pt")), [torch.zeros(1, 4)])
        assert model.device_note == ""


def test_a_model_that_fails_whichever_device_it_names_says_so_itself(accelerator: str, tmp_path: Path) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.zeros([3], device=torch.device("cpu"))

    path = save_script(Fails(), tmp_path / "m.pt")
    model = _core.TorchModel.load(str(path), [torch.zeros(1, 4)], device=accelerator)
    assert model.device_note == ""
    with pytest.raises(RuntimeError, match=r"device|size"):
        model.run([torch.zeros(1, 4).to(accelerator)])
