"""Replicas on the nodes that have what they need: CPUs, GPUs, and what nodes were given names for.

The GPUs are none: Ray counts what a node was started with, and on one of the nodes torch has a simulated device.
"""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.simdev import build
from tests.support.handler_archives import write_handler
from tests.support.ports import free_port
from tests.support.ray_cluster import ROOT, RayCluster

pytest.importorskip("ray", reason='ray is missing, so that NOTHING of clusters is checked: pip install "ray[serve]"')
pytestmark = [pytest.mark.ray, pytest.mark.server, pytest.mark.slow, pytest.mark.accelerator]

HANDLER = """
import json
import os


def handle(data, context):
    if data is None:
        return None
    told = {"node": os.environ["PYSERVE_TEST_NODE"], "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "gpu": context.system_properties.get("gpu_id")}
    return [told for _ in data]
"""


class Site:
    """What is started on a cluster with three nodes: one with CPUs alone, two with GPUs, which torch sees on one.

    Attributes:
        cluster: it.
        port: of Ray's proxy.
    """

    def __init__(self, cluster: RayCluster, archive: Path):
        self.cluster = cluster
        self.port = free_port()
        self._archive = archive

    def start(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.cluster.command(
            "start", str(self._archive), "--cluster", self.cluster.address, *arguments,
            "--inference-address", f"http://127.0.0.1:{self.port}",
        )  # fmt: skip

    def told(self, count: int) -> list[dict[str, Any]]:
        """What replicas tell; as many unlike each other as ``count`` within some time."""
        found: dict[str, dict[str, Any]] = {}
        for _ in range(400):
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/predictions/m", b"x", timeout=60) as answer:
                text = answer.read().decode()
            found[text] = json.loads(text)
            if len(found) == count:
                break
        return list(found.values())

    def stop(self) -> None:
        stopped = self.cluster.command("stop")
        assert stopped.returncode == 0, stopped.stderr

    def check_nothing_is_left(self) -> None:
        assert self.cluster.command("status", "--cluster", self.cluster.address).returncode == 3
        assert self.cluster.do("actors") == {"names": []}
        assert not list(self.cluster.folder.glob("*/cluster/*/m.mar"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("cluster")
    archive = write_handler(tmp_path_factory.mktemp("archives"), "m", HANDLER, config={"deviceType": "gpu"})
    with RayCluster(folder, ("plain",)) as cluster:
        simulated = {"SIMDEV": "1", "SIMDEV_DEVICES": "1", "PYTHONPATH": f"{ROOT}:{build.built()}"}
        cluster.do("add", folder=str(folder), name="real", num_cpus=2, num_gpus=2, resources={"fast": 1},
                   variables=simulated)  # fmt: skip
        cluster.do("add", folder=str(folder), name="broken", num_cpus=1, num_gpus=1, resources={"slow": 1})
        yield Site(cluster, archive)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--num-gpus", "3"], "no node of the cluster has 3 GPUs for a replica (GPUs: "),
        (["--num-gpus", "1", "--replicas", "4"], "4 replicas of 1 CPU and 1 GPU do not fit the cluster"),
        (["--resource", "tape=1"], "no node of the cluster has 1 tape for a replica (tape: none)"),
        (["--resource", "fast=1", "--resource", "slow=1"], "has 1 CPU and 1 fast and 1 slow together"),
        (["--replicas", "4", "--replicas-per-node", "1"], "1 on a node do not fit the cluster"),
        (["--num-gpus", "1.5"], "num_gpus is 1.5; above 1 it must be a whole number"),
        (["--resource", "fast"], "write NAME=AMOUNT"),
        (["--resource", "GPU=1"], "resources has GPU; give num_gpus"),
    ],
)
def test_what_no_node_has_is_told_and_nothing_begun(site: Site, arguments: list[str], text: str) -> None:
    refused = site.start(*arguments)
    assert refused.returncode == 1 and text in refused.stderr, refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert site.cluster.do("actors") == {"names": []}


def test_replicas_are_where_gpus_are_and_each_sees_its_own(site: Site) -> None:
    started = site.start("--num-gpus", "1", "--replicas", "2", "--resource", "fast=0.5")
    assert started.returncode == 0, started.stderr
    found = site.told(2)
    assert {each["node"] for each in found} == {"real"}
    assert sorted(each["visible"] for each in found) == ["0", "1"]
    assert {each["gpu"] for each in found} == {0}
    site.stop()
    site.check_nothing_is_left()


def test_a_replica_that_was_given_none_uses_none(site: Site) -> None:
    """Whatever Ray hides."""
    started = site.start("--resource", "fast=1")
    assert started.returncode == 0, started.stderr
    [found] = site.told(1)
    assert (found["node"], found["gpu"]) == ("real", None)
    site.stop()


def test_a_gpu_that_torch_does_not_see_is_a_reason_not_to_start(site: Site) -> None:
    """It would serve on the CPU."""
    failed = site.start("--num-gpus", "1", "--resource", "slow=1")
    assert failed.returncode == 1
    assert "num_gpus is 1, and torch sees no GPU on this node, with CUDA_VISIBLE_DEVICES=0" in failed.stderr
    assert failed.stderr.endswith("nothing is left of the start\n")
    site.check_nothing_is_left()


def test_replicas_per_node_spreads_them(site: Site) -> None:
    started = site.start("--replicas", "3", "--replicas-per-node", "1")
    assert started.returncode == 0, started.stderr
    assert {each["node"] for each in site.told(3)} == {"plain", "real", "broken"}
    site.stop()
