"""A replica on a Ray of one node: the HTTP API through Ray's proxy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.handler_archives import write_handler
from tests.support.ports import free_port
from tests.support.serving import ROOT
from tests.support.serving_models import write_linear

ray = pytest.importorskip("ray", reason='ray is missing: pip install "ray[serve]"')
pytestmark = [pytest.mark.ray, pytest.mark.server, pytest.mark.slow]

LIMIT_S = 400.0
# It gives itself 30 s to start, which is little beside other tests.
RAY_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_gcs_server_request_timeout_seconds": "180",
}
HANDLER = """
from ts.handler_utils.utils import send_intermediate_predict_response


def handle(data, context):
    if data is None:
        return None
    send_intermediate_predict_response(["one "], context.request_ids, "", 200, context)
    return ["end"]
"""
# A process of its own: Ray changes signals, logging and more of the one that it is started from.
PROGRAM = """
import http.client, json, sys
import ray
from ray import serve
import pyserve.cluster

store, port = sys.argv[1], int(sys.argv[2])
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=True, object_store_memory=100_000_000)
try:
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = {"models": [store + "/linear.mar", store + "/own.mar"], "num_cpus": 1, "replicas": "1..2",
            "target_wait_ms": 50}
    serve.run(pyserve.cluster.app(args), name="pyserve", route_prefix="/")

    def ask(method, path, body=None, headers={}):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    print(json.dumps({
        "ping": ask("GET", "/ping"),
        "linear": ask("POST", "/predictions/linear", "[1, 2, 3, 4]", {"Content-Type": "application/json"}),
        "own": ask("POST", "/predictions/own", "x"),
        "none": ask("POST", "/predictions/none", "x"),
        "metrics": ask("GET", "/metrics")[1].count("pyserve_worker_utilization{"),
        "status": {name: each.status for name, each in serve.status().applications.items()},
        "deployment": {name: each.status for app in serve.status().applications.values()
                       for name, each in app.deployments.items()},
    }), flush=True)
finally:
    serve.shutdown()
    ray.shutdown()
"""


def test_a_replica_answers_as_a_server_does(tmp_path: Path) -> None:
    write_linear(tmp_path)
    write_handler(tmp_path, "own", HANDLER)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(free_port())], cwd=tmp_path, capture_output=True, text=True,
        timeout=LIMIT_S, check=False, env={**os.environ, "PYTHONPATH": str(ROOT), **RAY_VARIABLES},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("{")))
    assert found["ping"] == [200, '{\n  "status": "Healthy"\n}\n']
    assert found["linear"][0] == 200 and len(json.loads(found["linear"][1])) == 3
    assert found["own"] == [200, "one end"]
    assert found["none"][0] == 404 and json.loads(found["none"][1])["type"] == "ModelNotFoundException"
    assert found["metrics"] == 2
    assert found["status"] == {"pyserve": "RUNNING"} and found["deployment"] == {"pyserve": "HEALTHY"}
