"""A cluster of Ray with a head and two nodes: commands, versions that switch, and whatever dies."""

from __future__ import annotations

import base64
import json
import random
import re
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.handler_archives import write_handler
from tests.support.ports import free_port
from tests.support.ray_cluster import RayCluster

pytest.importorskip("ray", reason='ray is missing: pip install "ray[serve]"')
pytestmark = [pytest.mark.ray, pytest.mark.server, pytest.mark.slow]

HANDLER = """
def handle(data, context):
    return ["version VERSION"] * len(data) if data else None
"""
# On one of the nodes it cannot be loaded.
PICKY = (
    """
import os

if os.environ["PYSERVE_TEST_NODE"] == "two":
    raise RuntimeError("this node lacks something")
"""
    + HANDLER
)
SIZE = 24 << 20
LIMIT_S = 240.0


def archive(folder: Path, version: str, source: str = HANDLER) -> str:
    """Its path; all but the code is one large file."""
    path = write_handler(folder, "m", source.replace("VERSION", version), version=version, file=f"m-{version}",
                         files={"large.txt": base64.b85encode(random.Random(7).randbytes(SIZE)).decode()})  # fmt: skip
    return str(path)


class Site:
    """What is served on the cluster.

    Attributes:
        cluster: it.
        folder: of archives.
    """

    def __init__(self, cluster: RayCluster, folder: Path):
        self.cluster = cluster
        self.folder = folder
        self.port = free_port()

    def ask(self) -> tuple[int, str, int]:
        """Status, text and generation of an answer; 0 if there was none."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/predictions/m", b"x")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode(), int(answer.headers["pyserve-generation"])
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), int(error.headers.get("pyserve-generation") or 0)
        except OSError as error:
            return 0, str(error), 0

    def status(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.cluster.command("status", "--json").stdout)
        return found

    def generations(self) -> list[int]:
        replicas = self.status().get("replicas") or []
        assert isinstance(replicas, list)
        return [each["generation"] for each in replicas]

    def until(self, generations: list[int]) -> None:
        ends_at = time.monotonic() + LIMIT_S
        while self.generations() != generations:
            assert time.monotonic() < ends_at, self.status()
            time.sleep(0.5)


class Load:
    """50 requests/s from several clients; a context at whose end they have stopped."""

    def __init__(self, site: Site):
        self._site = site
        self._ends = threading.Event()
        self.answers: list[tuple[float, int, str, int]] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(5)]

    def _run(self) -> None:
        while not self._ends.wait(0.1):
            began = time.monotonic()
            self.answers.append((began, *self._site.ask()))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("cluster")
    with RayCluster(folder) as cluster:
        found = Site(cluster, tmp_path_factory.mktemp("archives"))
        address = f"http://127.0.0.1:{found.port}"

        def start(path: str, replicas: str) -> subprocess.CompletedProcess[str]:
            return cluster.command(
                "start", "--cluster", cluster.address, "--models", path, "--inference-address", address,
                "--replicas", replicas,
            )  # fmt: skip

        refused = start(archive(found.folder, "1"), "9")
        assert "9 replicas of 1 CPU do not fit the cluster, which has room for 2" in refused.stderr
        failed = start(archive(found.folder, "0", "raise RuntimeError('it is broken')"), "2")
        assert failed.returncode == 1 and "it is broken" in failed.stderr, failed.stderr
        assert failed.stderr.endswith("nothing is left of the start\n")
        started = start(str(found.folder / "m-1.mar"), "2")
        assert started.returncode == 0, started.stderr
        assert "generation 1" in started.stdout and address in started.stdout
        yield found
        stopped = cluster.command("stop")
        assert stopped.returncode == 0 and stopped.stdout == "pyserve has stopped.\n", stopped.stderr
        assert cluster.command("status").returncode == 3


def test_what_is_registered_once_is_served_everywhere(site: Site) -> None:
    assert {site.ask() for _ in range(10)} == {(200, "version 1", 1)}
    status = site.status()
    [counts] = status["sent"].values()  # type: ignore[attr-defined]
    size = (site.folder / "m-1.mar").stat().st_size
    # From the head's node to each of the two, once.
    assert list(counts.values()) == [size, size], counts
    for name in ("one", "two"):
        node = site.cluster.folder / name
        assert len(list((node / "cluster").glob("*/m-1.mar"))) == 1
        unpacked = [each for each in (node / "archives").glob("*/files/handler.py") if "version 1" in each.read_text()]
        assert len(unpacked) == 1


def test_what_cannot_be_done_changes_nothing(site: Site) -> None:
    address = site.cluster.address
    again = site.cluster.command("start", "--cluster", address, "--models", str(site.folder / "m-1.mar"))
    assert again.returncode == 1 and "serves on this cluster already" in again.stderr
    served = site.cluster.command("deploy", str(site.folder / "m-1.mar"))
    assert served.returncode == 1 and "already registered" in served.stderr
    (site.folder / "torn.mar").write_bytes((site.folder / "m-1.mar").read_bytes()[:1000])
    torn = site.cluster.command("deploy", str(site.folder / "torn.mar"))
    assert torn.returncode == 1 and "torn.mar" in torn.stderr and len(torn.stderr.splitlines()) == 1
    elsewhere = site.cluster.command("status", "--cluster", "127.0.0.1:1")
    assert elsewhere.returncode == 1 and "127.0.0.1:1" in elsewhere.stderr
    assert site.generations() == [1, 1]


def test_a_version_switches_under_load_on_all_replicas(site: Site) -> None:
    path = archive(site.folder, "2")
    with Load(site) as load:
        time.sleep(1)
        deployed = site.cluster.command("deploy", path)
        assert deployed.returncode == 0, deployed.stderr
        after = time.monotonic()
        time.sleep(1)
    assert "m: default version 1 -> 2" in deployed.stdout
    took = re.search(r"generation 2 is served by 2 replicas on \d nodes, switched in (\d+) ms", deployed.stdout)
    assert took is not None, deployed.stdout
    print(took[0])
    wrong = [each for each in load.answers if each[1] != 200]
    assert not wrong, wrong[:3]
    assert {text == f"version {generation}" for _, _, text, generation in load.answers} == {True}
    later = [generation for began, _, _, generation in load.answers if began > after]
    assert later and set(later) == {2}
    assert len(load.answers) > 50


def test_a_version_that_one_node_cannot_load_is_served_nowhere(site: Site) -> None:
    with Load(site) as load:
        deployed = site.cluster.command("deploy", archive(site.folder, "3", PICKY))
    assert deployed.returncode == 1
    assert "this node lacks something" in deployed.stderr and "generation 2 is served as before" in deployed.stderr
    assert {each[1:] for each in load.answers} == {(200, "version 2", 2)}
    assert site.generations() == [2, 2]


def test_the_controls_may_die(site: Site) -> None:
    site.cluster.do("kill_actor", name="SERVE_CONTROLLER_ACTOR", namespace="serve")
    assert {site.ask() for _ in range(10)} == {(200, "version 2", 2)}
    site.cluster.do("kill_actor", name="control:pyserve:pyserve", namespace="pyserve")
    assert {site.ask() for _ in range(10)} == {(200, "version 2", 2)}
    site.until([2, 2])
    deployed = site.cluster.command("deploy", archive(site.folder, "4"))
    assert deployed.returncode == 0, deployed.stderr
    assert {site.ask() for _ in range(10)} == {(200, "version 4", 3)}


def test_a_replica_that_comes_late_ends_on_what_was_committed(site: Site) -> None:
    """It comes in the place of one that died, while the next version is on its way."""
    site.cluster.do("kill_replica")
    deployed = site.cluster.command("deploy", archive(site.folder, "5"))
    assert deployed.returncode == 0, deployed.stderr
    site.until([4, 4])
    assert {site.ask() for _ in range(20)} == {(200, "version 5", 4)}


def test_the_object_stores_keep_no_archive(site: Site) -> None:
    ends_at = time.monotonic() + 90
    while site.cluster.do("stored")["bytes"] > SIZE // 2:
        assert time.monotonic() < ends_at, site.cluster.do("stored")
        time.sleep(1)
