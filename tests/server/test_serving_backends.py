"""A served model changes to another backend under load; the next start begins with what was chosen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyserve.archive.archive import open_archive
from pyserve.backends.making import Making
from pyserve.backends.table import BACKENDS
from tests.support.serving import Load, Server
from tests.support.serving_models import write_torchscript

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = pytest.mark.server

SHAPE = (3, 48, 48)
HANG_S = 300


class Convolutions(nn.Module):
    """[n, 3, h, w] -> [n, 8]; takes more than a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first = nn.Conv2d(3, 48, 3, padding=1)
            self.second = nn.Conv2d(48, 48, 3, padding=1)
            self.third = nn.Conv2d(48, 48, 3, padding=1)
            self.head = nn.Linear(48, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x))))))
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores


def backend_of(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.describe("convolutions")["checks"].get("backend", {})
    return found


def settled(server: Server) -> dict[str, Any]:
    """What was chosen. Requests come first: were the server asked without pause, it would be chosen after this test."""
    end = time.monotonic() + HANG_S
    while (found := backend_of(server)).get("state") != "settled":
        assert time.monotonic() < end, found
        time.sleep(0.5)
    return found


def make(archive: Path, cache: str) -> None:
    """Makes it for OpenVINO at the usual priority: beside requests, and other tests, it would take minutes."""
    with open_archive(archive, cache_dir=Path(cache)) as opened:
        [made] = Making(opened, ["openvino"], batch_size_max=4, nice=0).wait(print, HANG_S)
        assert not made.error


@pytest.mark.skipif(bool(BACKENDS["openvino"].missing()), reason="openvino is not installed")
def test_another_backend_is_tried_and_kept_while_requests_come_in(server: Server, tmp_path: Path) -> None:
    server.environment["CXX"] = str(tmp_path / "none")  # a compiler would take a minute
    network = Convolutions()
    config = {
        "input": {"dtype": "float32", "shape": list(SHAPE)},
        "batchSize": 4,
        "backend": "auto",
        "backendTrialSeconds": 60,
    }
    write_torchscript(server.store, network, "convolutions", config=config)
    make(server.store / "convolutions.mar", server.environment["PYSERVE_CACHE"])
    server.start("--models", "convolutions.mar")
    with Load(server, "convolutions", network, SHAPE, clients=1) as load:
        load.wait_for_more(20)
    found = settled(server)
    with Load(server, "convolutions", network, SHAPE, clients=2) as load:
        load.wait_for_more(20)
    by_name = {each["backend"]: each for each in found["tried"]}
    assert by_name["openvino"]["difference"] < 1e-4 and "refused" not in by_name["openvino"], found
    server.run("stop")

    server.start("--models", "convolutions.mar")
    again = backend_of(server)
    assert (again["chosen"], again["state"], again["reason"]) == (found["chosen"], "settled", found["reason"])
    with Load(server, "convolutions", network, SHAPE, clients=2) as load:
        load.wait_for_more(20)


def test_a_model_that_does_not_say_stays_on_torchscript(server: Server) -> None:
    network = Convolutions()
    config = {"input": {"dtype": "float32", "shape": list(SHAPE)}}
    write_torchscript(server.store, network, "convolutions", config=config)
    server.start("--models", "convolutions.mar")
    found = backend_of(server)
    assert (found["chosen"], found["state"]) == ("torchscript", "settled")
