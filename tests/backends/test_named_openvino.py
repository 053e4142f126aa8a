"""`backend: openvino` from an archive to answers, with the real OpenVINO; left out where it is not installed."""

from __future__ import annotations

import math

import pytest
import torch

from pyserve.archive.archive import open_archive
from pyserve.backends import openvino
from pyserve.backends.kept import read_made
from pyserve.lanes.network import Network
from pyserve.models.loader import load_network
from pyserve.proof.comparison import difference
from tests.support.networks import Conv
from tests.support.serving_models import write_torchscript

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(openvino.missing()), reason=openvino.missing())]

CONFIG = {"input": {"dtype": "float32", "shape": [3, 16, 16]}, "backend": "openvino"}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    folder = tmp_path_factory.mktemp("openvino")
    patch = pytest.MonkeyPatch()
    patch.setenv("PYSERVE_CACHE", str(folder / "cache"))
    said: list[str] = []
    with open_archive(write_torchscript(folder, Conv(), "m", config=CONFIG)) as archive:
        loaded = load_network(
            archive, name="m", devices=["cpu"], batch_size=4, cpu_budget=2, limit_max_image_pixels=True,
            startup_timeout_s=600, progress=said.append,
        )  # fmt: skip
        made = read_made(archive, "openvino", "fp32")
    patch.undo()
    assert made is not None and made.error == "", made
    assert "comparing OpenVINO with TorchScript" in said
    return loaded


def test_it_answers_as_torchscript_does(network: Network) -> None:
    assert network.torch_model.backend == "openvino"
    found = network.findings["backend"]
    assert (found["chosen"], found["reason"]) == ("openvino", "as 'backend: openvino' says")
    assert found["tried"][0]["difference"] < 1e-4
    for rows in (1, 3, 4):
        pictures = torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(rows))
        expected = network.torch_model.run_plain([pictures])
        before = network.torch_model.plain_runs
        assert difference(expected, network.run([pictures])) < 1e-4
        assert network.torch_model.plain_runs == before, "OpenVINO itself has answered"


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e30])
def test_what_it_was_not_shown_on_is_torchscripts_answer(network: Network, number: float) -> None:
    pictures = torch.ones(2, 3, 16, 16)
    pictures[1, 0, 3, 3] = number
    before = network.torch_model.plain_runs
    got = network.run([pictures])
    assert network.torch_model.plain_runs == before + 1
    assert difference(network.torch_model.run_plain([pictures]), got) == 0


def test_its_batches_are_shown_as_far_as_they_were_asked_for(network: Network) -> None:
    assert network.batches is not None
    network.batches.extend(4)
    assert (network.batches.size_max, network.batches.note) == (4, "")
