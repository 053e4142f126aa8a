"""A stop while a model's batches are still being tried, in a thread that runs it without the interpreter's lock."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from tests.support.serving import RAW, Server
from tests.support.serving_models import write_torchscript

pytestmark = pytest.mark.server


class Slow(torch.nn.Module):
    """[n, 2] -> [n, 2], the same numbers after some 300 ms."""

    def forward(self, x):
        unit = torch.eye(512)
        product = unit
        for _ in range(100):
            product = product @ unit
        return x * product[0, 0]


def test_a_stop_ends_the_server_in_order(tmp_path: Path) -> None:
    server = Server(tmp_path)
    write_torchscript(
        server.store, Slow(), "slow", config={"input": {"dtype": "float32", "shape": [2]}, "batchSize": 64}
    )
    try:
        for _ in range(3):  # it ended by SIGSEGV in 4 of 5
            server.start("--models", "all")
            body = struct.pack("<2f", 1, 2)
            assert server.ask("POST", "/predictions/slow", body, RAW).body == body
            trying = server.describe("slow")["checks"]["batches"].startswith("being tried")
            server.run("stop")
            lines = [line for line in server.log().splitlines() if "server ended" in line or "killed by" in line]
            assert lines and all("ended with exit code 0" in line for line in lines), lines
            assert trying, "it is not slow enough to show anything"
    finally:
        server.run("stop")
        server.kill()
