"""A replica's health and load with an engine that runs, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import psutil
import pytest

from pyserve import devices
from pyserve.replicas.clustered import check_gpus
from pyserve.replicas.replica import Replica
from pyserve.serving import ServingError
from tests.support.handler_archives import write_handler
from tests.support.serving import LIMIT_S

pytestmark = pytest.mark.server

HANDLER = """
def handle(data, context):
    return None if data is None else ["answer" for _ in data]
"""


def kill_keepers() -> int:
    """What workers are forked from, and they with it."""
    killed = 0
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("zygote" in part for part in child.cmdline()):
                child.kill()
                killed += 1
    return killed


def test_a_replica_that_loses_what_its_workers_come_from_again_and_again_says_so(tmp_path: Path) -> None:
    write_handler(tmp_path, "own", HANDLER)

    async def main() -> None:
        replica = Replica([str(tmp_path / "own.mar")], {}, 1)
        await replica.check_health()  # its start says why it does not start
        async with replica.engine:
            await replica.check_health()
            deadline = asyncio.get_running_loop().time() + LIMIT_S
            killed = 0
            with pytest.raises(ServingError, match="forked from is gone"):
                while asyncio.get_running_loop().time() < deadline:
                    killed += kill_keepers()
                    await asyncio.sleep(0.1)
                    await replica.check_health()
            assert killed

    asyncio.run(main())


def test_a_replica_tells_its_load(tmp_path: Path) -> None:
    write_handler(tmp_path, "own", HANDLER)

    async def main() -> None:
        replica = Replica([str(tmp_path / "own.mar")], {}, 1)
        assert await replica.record_autoscaling_stats() == {"load": 0.0, "wait_s": 0.0}
        async with replica.engine:
            await replica.record_autoscaling_stats()
            for _ in range(3):
                assert await replica.engine.predict("own", b"x") == b"answer"
            await asyncio.sleep(0.01)
            told = await replica.record_autoscaling_stats()
            assert told["load"] > 0.0 and told["wait_s"] == 0.0

    asyncio.run(main())


def test_gpus_that_torch_does_not_see_are_told_with_what_hides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "count", lambda: 1)
    for enough in (0.0, 0.5, 1.0):
        check_gpus(enough)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    with pytest.raises(ServingError, match=r"num_gpus is 2, and torch sees 1 GPU on this node, with CUDA_\w+=3,4"):
        check_gpus(2.0)
    monkeypatch.setattr(devices, "count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ServingError, match=r"num_gpus is 0.5, and torch sees no GPU on this node; see `pyserve doc"):
        check_gpus(0.5)
