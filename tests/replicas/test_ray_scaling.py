"""How many replicas there are on a small Ray, by the load."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.handler_archives import write_handler
from tests.support.ray_nodes import RayNodes

pytest.importorskip("ray", reason='ray is missing, so that NOTHING of clusters is checked: pip install "ray[serve]"')
pytestmark = [pytest.mark.ray, pytest.mark.server, pytest.mark.slow]

# It waits and needs no processor.
HANDLER = """
import time


def handle(data, context):
    if data is None:
        return None
    time.sleep(0.3)
    return ["answer" for _ in data]
"""
STEADY_S = 60.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_handler(folder, "own", HANDLER)
    return folder


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    with RayNodes(tmp_path_factory.mktemp("ray")) as found:
        found.do("add_node", name="one", num_cpus=2)
        found.do("add_node", name="two", num_cpus=2)
        yield found


class Load:
    """Requests at a fixed rate, however long each takes; a context.

    Clients that wait for each answer would ask less of a busy machine, and the load would not be constant.
    """

    def __init__(self, nodes: RayNodes, path: str, rate: float):
        self.answers: Counter[int] = Counter()
        self._nodes, self._path, self._rate = nodes, path, rate
        self._ends = threading.Event()
        self._clock = threading.Thread(target=self._run)
        self._threads: list[threading.Thread] = []

    def _run(self) -> None:
        while not self._ends.wait(1 / self._rate):
            thread = threading.Thread(target=self._ask)
            self._threads.append(thread)
            thread.start()

    def _ask(self) -> None:
        self.answers[self._nodes.ask("POST", self._path, b"x").status] += 1

    def __enter__(self) -> Load:
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._clock.join()
        for thread in self._threads:
            thread.join()


def test_replicas_follow_the_load_and_rest_under_a_constant_one(nodes: RayNodes, store: Path) -> None:
    """Four requests a second of 300 ms are more than one replica can do, and two can; without them one is left."""
    args: dict[str, Any] = {"models": [str(store / "own.mar")], "replicas": "1..4", "downscale_delay_s": 60,
                            "target_wait_ms": 1000}  # fmt: skip
    nodes.do("run", args=args, name="scaled", prefix="/scaled")
    assert nodes.running("scaled") == 1
    with Load(nodes, "/scaled/predictions/own", 4.0) as load:
        begun = time.monotonic()
        nodes.wait_for(lambda: sum(nodes.do("states", name="scaled").values()) >= 2, "a second replica")
        print(f"ordered after {time.monotonic() - begun:.1f} s")
        nodes.wait_for(lambda: nodes.running("scaled") >= 2, "a second replica that runs")
        print(f"served by more after {time.monotonic() - begun:.1f} s")
        steady, seen, until = Counter[int](), [nodes.running("scaled")], time.monotonic() + STEADY_S
        while time.monotonic() < until:
            count = sum(nodes.do("states", name="scaled").values())
            steady[count] += 1
            if count != seen[-1]:
                seen.append(count)
            time.sleep(0.5)
    assert set(load.answers) == {200}, load.answers
    assert sorted(seen) == seen, f"it went up and down: {seen}"
    nodes.wait_for(lambda: nodes.do("states", name="scaled") == {"RUNNING": 1}, "one replica to be left")
    nodes.do("delete", name="scaled")


def test_the_last_replica_goes_where_that_was_asked_for_and_comes_with_a_request(nodes: RayNodes, store: Path) -> None:
    args = {"models": [str(store / "own.mar")], "replicas": "0..2", "downscale_delay_s": 2,
            "downscale_to_zero_delay_s": 4}  # fmt: skip
    nodes.do("run", args=args, name="idle", prefix="/idle")
    nodes.wait_for(lambda: nodes.do("states", name="idle") == {}, "no replica to be left")
    assert nodes.ask("POST", "/idle/predictions/own", b"x").status == 200
    nodes.do("delete", name="idle")
