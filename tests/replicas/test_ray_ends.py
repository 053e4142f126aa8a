"""What commands leave behind on a cluster that are interrupted, that end what is served, or whose cluster goes away."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.handler_archives import write_handler
from tests.support.ports import free_port
from tests.support.ray_cluster import RayCluster
from tests.support.serving import RAW

pytest.importorskip("ray", reason='ray is missing, so that NOTHING of clusters is checked: pip install "ray[serve]"')
pytestmark = [pytest.mark.ray, pytest.mark.server, pytest.mark.slow]

LIMIT_S = 240.0
# Begins to load, or to answer, and goes on when a file has gone.
HANDLER = """
import os
import pathlib
import time


def hold(path):
    if os.path.exists(path):
        pathlib.Path(f"{path}.begun-{os.getpid()}").touch()
        while os.path.exists(path):
            time.sleep(0.01)


hold("LOADING")


def handle(data, context):
    if data is None:
        return None
    if bytes(data[0].get("body")) == b"hold":
        hold("ANSWERING")
    return ["version VERSION"] * len(data)
"""


class Site:
    """A cluster of one node beside its head, and what holds the models that are served there.

    Attributes:
        cluster: it.
        loading, answering: while these files are there models load, and requests of ``hold`` are answered.
        port: of Ray's proxy.
    """

    def __init__(self, cluster: RayCluster, folder: Path):
        self.cluster = cluster
        self.folder = folder
        self.loading, self.answering = folder / "loading", folder / "answering"
        self.port = free_port()

    def archive(self, version: str) -> str:
        source = HANDLER.replace("LOADING", str(self.loading)).replace("ANSWERING", str(self.answering))
        source = source.replace("VERSION", version)
        return str(write_handler(self.folder, "m", source, version=version, file=f"m-{version}"))

    def arguments(self, version: str) -> list[str]:
        return ["start", self.archive(version), "--cluster", self.cluster.address,
                "--inference-address", f"http://127.0.0.1:{self.port}"]  # fmt: skip

    def start(self, version: str = "1") -> None:
        started = self.cluster.command(*self.arguments(version))
        assert started.returncode == 0, started.stderr

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """A command that runs on."""
        return subprocess.Popen(
            [sys.executable, "-m", "pyserve", *arguments, "--pid-file", str(self.cluster.folder / "pid")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.cluster.folder,
            env=self.cluster.environment(), start_new_session=True,
        )  # fmt: skip

    def ask(self, body: bytes = b"x") -> str:
        """The answer's text; its status in words if that is none of success."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/predictions/m", body, RAW)
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return f"status {error.code}"
        except OSError as error:
            return f"no answer: {error}"

    def is_begun(self, held: Path) -> bool:
        return bool(list(self.folder.glob(f"{held.name}.begun-*")))

    @contextlib.contextmanager
    def holding(self, held: Path) -> Iterator[None]:
        held.touch()
        try:
            yield
        finally:
            held.unlink(missing_ok=True)
            for mark in self.folder.glob(f"{held.name}.begun-*"):
                mark.unlink()

    def stop(self) -> subprocess.CompletedProcess[str]:
        return self.cluster.command("stop", "--cluster", self.cluster.address)

    def check_nothing_is_left(self) -> None:
        assert self.cluster.do("actors") == {"names": []}
        assert not list(self.cluster.folder.glob("*/cluster/*/*"))


def until(condition: Callable[[], bool], what: str) -> None:
    ends_at = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < ends_at, f"waited in vain for {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with RayCluster(tmp_path_factory.mktemp("cluster"), ("one",)) as cluster:
        yield Site(cluster, tmp_path_factory.mktemp("archives"))


def test_a_start_that_is_interrupted_leaves_nothing(site: Site) -> None:
    with site.holding(site.loading):
        started = site.begin(*site.arguments("1"))
        until(lambda: site.is_begun(site.loading), "the model to load")
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate(timeout=LIMIT_S)
    assert started.returncode == 130, errors
    assert "Traceback" not in errors
    assert site.cluster.command("status", "--cluster", site.cluster.address).returncode == 3
    site.check_nothing_is_left()


def test_a_deployment_that_is_interrupted_leaves_the_old_version(site: Site) -> None:
    site.start("1")
    with site.holding(site.loading):
        deployed = site.begin("deploy", site.archive("2"), "--cluster", site.cluster.address)
        until(lambda: site.is_begun(site.loading), "the second version to load")
        deployed.send_signal(signal.SIGINT)
        _, errors = deployed.communicate(timeout=LIMIT_S)
    assert deployed.returncode == 130 and "Traceback" not in errors, errors
    assert site.ask() == "version 1"
    again = site.cluster.command("deploy", site.archive("2"), "--cluster", site.cluster.address)
    assert again.returncode == 0 and "generation 2" in again.stdout, again.stderr
    assert site.ask() == "version 2"


def test_a_stop_waits_as_long_as_it_is_told_to_and_a_second_one_ends_what_runs(site: Site) -> None:
    answers: list[str] = []
    with site.holding(site.answering):
        asking = threading.Thread(target=lambda: answers.append(site.ask(b"hold")))
        asking.start()
        until(lambda: site.is_begun(site.answering), "a request to be held")
        first = site.cluster.command("stop", "--cluster", site.cluster.address, "--timeout", "1")
        assert first.returncode == 1
        assert "still draining after 1 s; a second `pyserve stop` ends it at once" in first.stderr
        assert not answers
        second = site.stop()
        assert second.returncode == 0, second.stderr
        asking.join()
    assert answers[0].startswith(("status 5", "no answer"))
    site.check_nothing_is_left()


def test_what_was_accepted_is_answered_before_the_end(site: Site) -> None:
    site.start("1")
    answers: list[str] = []
    with site.holding(site.answering):
        asking = threading.Thread(target=lambda: answers.append(site.ask(b"hold")))
        asking.start()
        until(lambda: site.is_begun(site.answering), "a request to be held")
        stopping = site.begin("stop", "--cluster", site.cluster.address)
        until(lambda: "RUNNING" not in site.cluster.do("states"), "the replica to be told")
    asking.join()
    out, errors = stopping.communicate(timeout=LIMIT_S)
    assert (stopping.returncode, out, answers) == (0, "pyserve has stopped.\n", ["version 1"]), errors
    site.check_nothing_is_left()


def test_what_ray_serve_deleted_is_ended_by_a_stop(site: Site) -> None:
    site.start("1")
    site.cluster.do("delete")
    # What was changed outlives it: a config may be deployed again.
    assert "control:pyserve:pyserve" in site.cluster.do("actors")["names"]
    assert site.cluster.command("status", "--cluster", site.cluster.address).returncode == 3
    assert site.stop().stdout == "pyserve has stopped.\n"
    assert site.stop().returncode == 1
    assert "control:pyserve:pyserve" not in site.cluster.do("actors")["names"]
    assert not list(site.cluster.folder.glob("*/cluster/*/*"))


def test_a_deployment_to_no_replica_is_what_the_next_one_serves(site: Site) -> None:
    args = {"models": [site.archive("1")], "replicas": "0..1", "downscale_delay_s": 1, "downscale_to_zero_delay_s": 2}
    site.cluster.do("run", args=args, port=site.port)
    until(lambda: site.cluster.do("states") == {}, "no replica to be left")
    deployed = site.cluster.command("deploy", site.archive("2"), "--cluster", site.cluster.address)
    assert deployed.returncode == 0, deployed.stderr
    assert "no replica runs just now, so that none has tried it; the next ones serve it" in deployed.stderr
    assert "m: default version 1 -> 2" in deployed.stdout
    assert site.ask() == "version 2"
    assert site.stop().returncode == 0
    site.check_nothing_is_left()


def test_a_cluster_that_goes_away_meanwhile_is_told(site: Site) -> None:
    """The last of this cluster."""
    site.start("1")
    with site.holding(site.loading):
        deployed = site.begin("deploy", site.archive("2"), "--cluster", site.cluster.address)
        until(lambda: site.is_begun(site.loading), "the second version to load")
        site.cluster.kill()
        _, errors = deployed.communicate(timeout=LIMIT_S)
    assert deployed.returncode == 1
    [line] = errors.splitlines()
    assert f"the cluster at {site.cluster.address} went away meanwhile" in line
    gone = site.cluster.command("status", "--cluster", site.cluster.address)
    assert gone.returncode == 1 and "no Ray cluster is found at" in gone.stderr
