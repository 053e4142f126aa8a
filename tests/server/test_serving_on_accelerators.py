"""A whole server on accelerators: the native lane on one device, worker processes on another, the CPU's answers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.handler_archives import write_handler
from tests.support.serving import RAW, SEED, Server, at_once
from tests.support.serving_models import LINEAR_INPUT, Linear, write_torchscript

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = [pytest.mark.server, pytest.mark.accelerator]

HANDLER = """
import numpy as np
import torch
from ts.torch_handler.base_handler import BaseHandler


class Where(BaseHandler):
    def preprocess(self, data):
        rows = [np.frombuffer(bytes(row["body"]), np.float32) for row in data]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def postprocess(self, data):
        gpu_id = self.context.system_properties["gpu_id"]
        where = [str(self.device), str(data.device), str(next(self.model.parameters()).device)]
        return [{"scores": row, "gpu_id": gpu_id, "where": where} for row in data.tolist()]
"""


@pytest.fixture
def on_devices(server: Server, tmp_path: Path) -> Server:
    """Started: ``native`` on simdev:0, ``python`` on simdev:1, under delays by chance."""
    from tests.simdev.serving import give_device

    print(f"PYSERVE_TEST_SEED={SEED}")
    batches = {"batchSize": 8, "maxBatchDelay": 20, "deviceType": "gpu"}
    config = {"input": LINEAR_INPUT, **batches}
    write_torchscript(server.store, Linear(), "native", config={**config, "deviceIds": [0]})
    write_handler(server.store, "python", HANDLER, network=Linear(1), config={**batches, "deviceIds": [1]})
    give_device(server, at_start=f"random seed={SEED} max_us=1000")
    server.start("--models", "native.mar", "python.mar")
    return server


def items(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(4, generator=generator) for _ in range(count)]


def ask_all(server: Server, model: str, xs: list[torch.Tensor], clients: int = 8) -> list[bytes]:
    """The bodies of all answers, in the order of ``xs``; several clients ask at once."""

    def ask(number: int) -> list[bytes]:
        with server.client() as client:
            mine = [client.ask("POST", f"/predictions/{model}", x.numpy().tobytes(), RAW) for x in xs[number::clients]]
        assert {answer.status for answer in mine} == {200}, mine
        return [answer.body for answer in mine]

    answers = at_once([partial(ask, number) for number in range(clients)])
    return [answers[i % clients][i // clients] for i in range(len(xs))]


def test_both_lanes_answer_on_their_device_as_the_cpu_does(on_devices: Server) -> None:
    xs = items(120)
    with torch.inference_mode():
        expected, other = Linear()(torch.stack(xs)), Linear(1)(torch.stack(xs))
    for i, body in enumerate(ask_all(on_devices, "native", xs)):
        got = torch.frombuffer(bytearray(body), dtype=torch.float32)
        torch.testing.assert_close(got, expected[i], atol=1e-5, rtol=1e-5)
    for i, body in enumerate(ask_all(on_devices, "python", xs)):
        answer: dict[str, Any] = json.loads(body)
        torch.testing.assert_close(torch.tensor(answer["scores"]), other[i], atol=1e-5, rtol=1e-5)
        assert answer["gpu_id"] == 1 and set(answer["where"]) == {"simdev:1"}
    described = on_devices.describe("native")
    assert {worker["gpu"] for worker in described["workers"]} == {True}, described
