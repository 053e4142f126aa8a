"""Replicas that are no good are replaced: by a stuck loop, a lost device, a lost keeper of workers, a killed node."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.simdev import build
from tests.support.handler_archives import Doubler, write_handler
from tests.support.ray_nodes import RayNodes
from tests.support.serving import JSON
from tests.support.serving_models import Linear, write_torchscript

pytest.importorskip("ray", reason='ray is missing, so that NOTHING of clusters is checked: pip install "ray[serve]"')
pytestmark = [pytest.mark.ray, pytest.mark.server, pytest.mark.slow, pytest.mark.accelerator]

# Period and limit of the checks: users wait longer for a replica that is busy.
HEALTH = [1.0, 4.0]
# It runs in the replica's process, partly on its event loop.
THREAD = """
import os, time

import torch
from ts.torch_handler.base_handler import BaseHandler


class Own(BaseHandler):
    def preprocess(self, data):
        rows = [row.get("body") for row in data]
        if [9, 9] in rows:
            time.sleep(600)
        return torch.tensor(rows, dtype=torch.float32)

    def postprocess(self, data):
        return [{"pid": os.getpid()} for _ in data]
"""
PROCESS = """
import os, pathlib, time


def handle(data, context):
    if data is None:
        return None
    body = data[0].get("body")
    if isinstance(body, dict) and "hold" in body:
        hold = pathlib.Path(body["hold"])
        pathlib.Path(f"{hold}.begun").touch()
        while hold.exists():
            time.sleep(0.01)
    return [{"pid": os.getpid()}]
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    config = {"isolation": "thread", "deviceType": "cpu", "input": {"dtype": "float32", "shape": [2]}}
    write_handler(folder, "thread", THREAD, network=Doubler(), config=config)
    write_handler(folder, "process", PROCESS)
    place = {"deviceType": "gpu", "input": {"dtype": "float32", "shape": [4]}}
    write_torchscript(folder, Linear(), "device", config=place)
    return folder


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    folder = tmp_path_factory.mktemp("ray")
    variables = {
        "SIMDEV": "1", "SIMDEV_DEVICES": "1", "SIMDEV_FAULTS": str(folder / "faults"),
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    }  # fmt: skip
    with RayNodes(folder, variables, paths=[str(build.built())]) as found:
        for name in ("one", "two"):
            found.do("add_node", name=name, num_cpus=2, num_gpus=1)
        yield found


def answer(nodes: RayNodes, path: str, value: Any, limit_s: float = 5.0) -> Any:
    """None where nobody answers, or not with 200."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        found = nodes.ask("POST", path, json.dumps(value).encode(), JSON, limit_s=limit_s)
        return found.json if found.status == 200 else None
    return None


def pid_of(nodes: RayNodes, app: str) -> int | None:
    found = answer(nodes, f"/{app}/predictions/thread", [1, 2])
    return None if found is None else int(found["pid"])


def started(nodes: RayNodes, store: Path, app: str, *models: str, **args: Any) -> int:
    """The process of its replica."""
    paths = [str(store / f"{model}.mar") for model in models]
    nodes.do("run", args={"models": paths, **args}, name=app, prefix=f"/{app}", health=HEALTH)
    nodes.wait_for(lambda: pid_of(nodes, app) is not None, "its first answer")
    pid = pid_of(nodes, app)
    assert pid is not None
    return pid


def is_another(nodes: RayNodes, app: str, pid: int) -> bool:
    return pid_of(nodes, app) not in (None, pid)


def test_a_replica_whose_loop_is_stuck_is_replaced(nodes: RayNodes, store: Path) -> None:
    pid = started(nodes, store, "stuck", "thread")
    asking = threading.Thread(target=answer, args=(nodes, "/stuck/predictions/thread", [9, 9], 30.0))
    asking.start()
    nodes.wait_for(lambda: is_another(nodes, "stuck", pid), "another replica")
    asking.join()
    nodes.wait_for(lambda: not psutil.pid_exists(pid), "the stuck process to have ended")
    nodes.do("delete", name="stuck")


def test_a_replica_whose_device_is_lost_is_replaced(nodes: RayNodes, store: Path) -> None:
    pid = started(nodes, store, "broken", "thread", "device", num_gpus=1)
    path = "/broken/predictions/device"
    before = answer(nodes, path, [1, 2, 3, 4])
    assert before is not None
    faults = nodes.folder / "faults"
    (nodes.folder / "faults.new").write_text(f"break at=0 pid={pid}\n")
    (nodes.folder / "faults.new").rename(faults)
    nodes.wait_for(lambda: answer(nodes, path, [1, 2, 3, 4]) is None or not faults.exists(), "the fault to be taken")
    nodes.wait_for(lambda: is_another(nodes, "broken", pid), "another replica")
    nodes.wait_for(lambda: answer(nodes, path, [1, 2, 3, 4]) == before, "the same answer")
    nodes.do("delete", name="broken")


def test_a_replica_that_cannot_fork_workers_is_replaced(nodes: RayNodes, store: Path) -> None:
    """What they are forked from is killed each time it comes back."""
    pid = started(nodes, store, "keeper", "thread", "process")
    replica = psutil.Process(pid)

    def without() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in replica.children():
                if any("zygote" in part for part in child.cmdline()):
                    child.kill()
        return is_another(nodes, "keeper", pid)

    nodes.wait_for(without, "another replica")
    nodes.wait_for(lambda: answer(nodes, "/keeper/predictions/process", "x") is not None, "workers")
    nodes.do("delete", name="keeper")


def test_a_killed_node_loses_only_what_ran_there_and_comes_back(nodes: RayNodes, store: Path) -> None:
    """One replica on each of two nodes, under load: at most the requests that the killed one had fail."""
    args = {"models": [str(store / "process.mar")], "replicas": 2, "replicas_per_node": 1}
    nodes.do("run", args=args, name="nodes", prefix="/nodes", health=HEALTH)
    statuses: Counter[int] = Counter()
    ends = threading.Event()
    clients = 4

    def ask() -> None:
        while not ends.is_set():
            try:
                statuses[nodes.ask("POST", "/nodes/predictions/process", b"x").status] += 1
            except (OSError, http.client.HTTPException):
                statuses[0] += 1

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        nodes.wait_for(lambda: statuses[200] > 50, "answers")
        nodes.do("add_node", name="three", num_cpus=2)
        nodes.do("kill_node", name="two")
        before = statuses[200]
        nodes.wait_for(lambda: statuses[200] > before + 200, "answers from the other node")
        nodes.wait_for(lambda: nodes.running("nodes") == 2, "the replica on a third node")
    finally:
        ends.set()
        for thread in threads:
            thread.join()
    failed = sum(count for status, count in statuses.items() if status != 200)
    print(dict(statuses))
    assert failed <= clients, f"{statuses}: more than what was asked of the replica at that moment"
    nodes.do("delete", name="nodes")


def test_a_client_that_hangs_up_and_one_whose_time_is_over_take_their_requests_along(
    nodes: RayNodes, store: Path, tmp_path: Path
) -> None:
    nodes.do("run", args={"models": [str(store / "process.mar")]}, name="gone", prefix="/gone", health=HEALTH)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    first.touch()
    path = "/gone/predictions/process"
    holding = threading.Thread(target=answer, args=(nodes, path, {"hold": str(first)}, 240.0))
    holding.start()
    nodes.wait_for(Path(f"{first}.begun").exists, "the worker to be held")
    body = json.dumps({"hold": str(second)}).encode()
    with socket.create_connection(("127.0.0.1", nodes.port)) as leaving:
        leaving.sendall(b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                        % (path.encode(), len(body), body))  # fmt: skip
        nodes.wait_for(lambda: told(nodes, "pyserve_queue_size") == 1, "the second to wait")
    nodes.wait_for(lambda: told(nodes, "pyserve_requests_aborted_total") == 1, "the second to be known to be gone")
    late = nodes.ask("POST", path, json.dumps({"hold": str(third)}).encode(), {**JSON, "x-request-timeout-ms": "200"})
    assert late.status in (503, 504), late
    first.unlink()
    holding.join()
    assert answer(nodes, path, "x") is not None
    assert not Path(f"{second}.begun").exists() and not Path(f"{third}.begun").exists(), "they were run all the same"
    nodes.do("delete", name="gone")


def told(nodes: RayNodes, sample: str) -> int:
    """By the metrics of the replica, which has one model."""
    lines = nodes.ask("GET", "/gone/metrics").body.decode().splitlines()
    return int(float(next(line for line in lines if line.startswith(sample + "{")).rpartition(" ")[2]))
