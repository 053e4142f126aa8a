"""Layout and precision of models on accelerators, and what torch does with their first runs."""

from __future__ import annotations

# TorchScript reads the annotations of `forward`, and takes what has none for a tensor.
# mypy: disable-error-code="no-untyped-def"
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyserve import _core
from tests.support.device_bench import DeviceBench, numbers, saved
from tests.support.networks import Affine, Conv

PICTURE = torch.zeros(1, 3, 8, 8)


class Views(nn.Module):
    """Takes for granted that numbers lie in memory in the order of their indices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.convolution(x).view(x.size(0), -1)


class ReadsMemory(Views):
    """The same, but where it is not so its answers are wrong."""

    def forward(self, x):
        y = self.convolution(x)
        return y.as_strided([y.size(0), 144], [144, 1])


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("simdev:0", {"precision": "bf16", "chooses_layout": True}, True),
        ("simdev:0", {"precision": "fp16", "chooses_layout": True}, True),
        ("simdev:0", {"precision": "bf16"}, False),
        ("simdev:0", {"chooses_layout": True}, False),
        ("simdev:0", {"channels_last": True}, True),
        ("cpu", {"precision": "bf16", "chooses_layout": True}, False),
    ],
)
def test_convolutions_of_less_than_fp32_are_channels_last_on_an_accelerator(
    simdev: Any, tmp_path: Path, device: str, options: dict[str, Any], expected: bool
) -> None:
    network = Conv()
    model = _core.TorchModel.load(str(saved(network, tmp_path)), [PICTURE], device=device, **options)
    assert model.is_channels_last is expected
    (item,) = numbers(1, 3, 8, 8)
    for each in (model, *([model.copy_on("simdev:1")] if device != "cpu" else [])):
        assert each.is_channels_last is expected
        with torch.inference_mode():
            answer = each.run([item.to("simdev:1" if each is not model else device)]).cpu().float()
            assert torch.allclose(answer, network(item), atol=0.03)


@pytest.mark.parametrize("network", [Affine(), Views(), ReadsMemory()], ids=lambda network: type(network).__name__)
def test_networks_that_gain_nothing_or_need_the_other_layout_keep_it(
    simdev: Any, tmp_path: Path, network: nn.Module
) -> None:
    shape = [16] if isinstance(network, Affine) else [3, 8, 8]
    others = [[item] for item in numbers(2, *shape)]
    model = _core.TorchModel.load(str(saved(network, tmp_path)), [torch.zeros(1, *shape)], device="simdev:0",
                                  precision="bf16", chooses_layout=True, others=others)  # fmt: skip
    assert not model.is_channels_last
    for (item,) in others:
        with torch.inference_mode():
            answer = model.run([item.to("simdev:0")]).cpu().float()
            assert torch.allclose(answer, network(item), atol=0.05)


def test_a_model_on_an_accelerator_is_not_measured_and_fused_while_requests_wait(simdev: Any, tmp_path: Path) -> None:
    before = torch._C._jit_set_profiling_mode(True), torch._C._jit_texpr_fuser_enabled()
    try:
        torch._C._jit_set_texpr_fuser_enabled(True)
        _core.TorchModel.load(str(saved(Affine(), tmp_path)), [torch.zeros(1, 16)], device="simdev:0")
        assert torch._C._jit_set_profiling_mode(False) is False
        assert not torch._C._jit_texpr_fuser_enabled()
    finally:
        torch._C._jit_set_profiling_mode(before[0])
        torch._C._jit_set_texpr_fuser_enabled(before[1])


def test_a_new_size_costs_no_more_than_its_run(simdev: Any, tmp_path: Path) -> None:
    lane = DeviceBench(saved(Affine(), tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=8,
                       batching={"no_padding": "not here", "no_graphs": "not here"})  # fmt: skip
    launches = []
    for _ in range(3):
        before = simdev.counters()["launches"]
        lane.ask_batch(numbers(3, 16))
        launches.append(simdev.counters()["launches"] - before)
    assert len(set(launches)) == 1
    lane.close()


def test_a_lane_without_a_model_is_refused_by_type() -> None:
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        _core.Lane(_core.Engine(), None, [torch.zeros(1, 16)], 8)  # type: ignore[arg-type]
