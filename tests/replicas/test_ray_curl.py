"""The documented curl calls through Ray, predictions and management alike, and beside them what our own pages call."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.handler_archives import write_handler
from tests.support.ports import free_port
from tests.support.ray_nodes import RayNodes
from tests.support.serving import JSON, LIMIT_S, NAMES, ROOT, Answer, Server
from tests.support.serving_models import write_linear

pytest.importorskip("ray", reason='ray is missing, so that NOTHING of clusters is checked: pip install "ray[serve]"')
pytestmark = [pytest.mark.ray, pytest.mark.server, pytest.mark.slow]

KEYS = {scope: {"key": f"{scope}-" + "k" * 30} for scope in ("inference", "management", "API")}
ALL_KEYS = {f"Bearer {each['key']}" for each in KEYS.values()}
STORY = """
from ts.handler_utils.utils import send_intermediate_predict_response


def handle(data, context):
    if data is None:
        return None
    send_intermediate_predict_response([{"text_output": "Once"}], context.request_ids, "", 200, context)
    return [{"text_output": " upon"}]
"""
LINEAR = json.dumps({"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
PROMPT = json.dumps({"text_input": "Once", "parameters": {"count": 3}}).encode()
# Of README.md and docs/, each method, path, body and headers.
CALLS: dict[str, tuple[str, str, bytes | None, dict[str, str]]] = {
    "README, a prediction": ("PUT", "/predictions/linear", b"[1, 2, 3, 4]", JSON),
    "README, models": ("GET", "/models", None, {}),
    "README, workers": ("PUT", "/models/linear?min_worker=2&synchronous=true", None, {}),
    "deadlines": ("POST", "/predictions/linear", b"[1, 2, 3, 4]", {**JSON, "x-request-timeout-ms": "20000"}),
    "handlers, a stream of events": ("POST", "/predictions/story", PROMPT, {**JSON, "Accept": "text/event-stream"}),
    "kserve, metadata": ("GET", "/v2/models/linear", None, {}),
    "kserve, infer": ("POST", "/v2/models/linear/infer", LINEAR, JSON),
    "kserve, predict": ("POST", "/v1/models/linear:predict", b'{"instances": [[1, 2, 3, 4]]}', {}),
    "kserve, a file": ("POST", "/v2/models/story/infer", b"\xff\xd8", {"Inference-Header-Content-Length": "0"}),
    "kserve, generate": ("POST", "/v2/models/story/generate", PROMPT, {}),
    "kserve, generate_stream": ("POST", "/v2/models/story/generate_stream", PROMPT, {}),
    "operations, compressed": ("GET", "/models/linear", None, {"Accept-Encoding": "gzip"}),
    "the console's description": ("GET", "/openapi.json?model=linear", None, {}),
    "health": ("GET", "/v2/health/ready", None, {}),
}
# What is of a moment, of a process, or of a cluster.
OF_THE_MOMENT = re.compile(
    r'(?<="startTime": )"[^"]*"|(?<="pid": )\d+|(?<="memoryUsage": )\d+'
    r"|127\.0\.0\.1:\d+|[0-9a-f]{8}-[0-9a-f-]{27}"
)
# What one replica has done, and what is private where strangers may ask.
OF_ONE_REPLICA = ("/batchSizeHistogram", "/mean", "/modelDir")


class Sites:
    """One node with one port for all, and a cluster, with the same models and keys."""

    def __init__(self, server: Server, nodes: RayNodes, folder: Path):
        self.server, self.nodes, self.folder = server, nodes, folder

    def ask(self, name: str, scope: str) -> tuple[Answer, Answer]:
        method, path, body, headers = CALLS[name]
        headers = {**headers, "Authorization": f"Bearer {KEYS[scope]['key']}"}
        return self.server.ask(method, path, body, headers), self.nodes.ask(method, path, body, headers)

    def managed(self, method: str, path: str) -> Answer:
        return self.nodes.ask(method, path, None, {"Authorization": f"Bearer {KEYS['management']['key']}"})


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a web server with an archive."""
    folder = tmp_path_factory.mktemp("web")
    write_handler(folder, "far", STORY)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found.server_port
        found.shutdown()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory, web: int) -> Iterator[Sites]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "keys.json").write_text(json.dumps(KEYS))
    (folder / "keys.json").chmod(0o600)
    server = Server(folder)
    server.environment |= {"PYSERVE_CONSOLE": "false", "PYSERVE_DISABLE_TOKEN_AUTHORIZATION": "false"}
    write_linear(server.store)
    write_handler(server.store, "story", STORY)
    config: dict[str, Any] = {
        "enable_model_api": True, "token_file": str(folder / "keys.json"), "model_store": str(server.store),
        "allowed_urls": f"http://127.0.0.1:{web}/.*", "allow_private_addresses": True,
    }  # fmt: skip
    with server, RayNodes(tmp_path_factory.mktemp("ray"), {"PYSERVE_CACHE": str(folder / "ray-cache")}) as nodes:
        address = f"http://127.0.0.1:{free_port()}"
        places = [word for name in NAMES for word in (f"--{name}-address", address)]
        server.start("--models", "all", "--enable-model-api", "--token-file", config["token_file"], *places)
        for name in ("one", "two"):
            nodes.do("add_node", name=name, num_cpus=1)
        models = [str(server.store / name) for name in ("linear.mar", "story.mar")]
        nodes.do("run", args={"models": models, "replicas": 2, "config": config}, name="curl", prefix="/")
        yield Sites(server, nodes, folder)


def test_every_documented_call_has_its_documented_answer(sites: Sites) -> None:
    """By the script that users can run, which packs two versions into the model store."""
    address = f"http://127.0.0.1:{sites.nodes.port}"
    done = subprocess.run(
        [str(ROOT / "tests/golden/documented_calls.sh"), str(sites.server.store)], capture_output=True, text=True,
        timeout=5 * LIMIT_S, check=False,
        env={
            **sites.server.environment, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "ARCHIVER": f"{sys.executable} -m pyserve.commands.torch_model_archiver", "INFERENCE": address,
            "MANAGEMENT": address, "METRICS": address, "KEY_FILE": str(sites.folder / "keys.json"), "FIXED_KEYS": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, "\n".join(done.stdout.split("\n\n")[-80:]) + done.stderr
    assert re.search(r"^(\d+) calls, 0 of them", done.stdout, re.MULTILINE)


def shown(answer: Answer) -> tuple[int, str, Any]:
    body = answer.body
    if answer.headers.get("content-encoding") == "gzip":
        body = gzip.decompress(body)
    text = OF_THE_MOMENT.sub("0", body.decode())
    kind = answer.headers.get("content-type", "")
    return answer.status, kind, json.loads(text) if kind.startswith("application/json") else text


def differences(ours: Any, alone: Any, place: str = "") -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(alone, dict):
        for key in sorted(ours.keys() | alone.keys()):
            yield from differences(ours.get(key), alone.get(key), f"{place}/{key}")
    elif isinstance(ours, list | tuple) and isinstance(alone, list | tuple) and len(ours) == len(alone):
        for one, other in zip(ours, alone, strict=True):
            yield from differences(one, other, place)
    elif ours != alone:
        yield f"{place}: {ours!r} in the cluster, {alone!r} alone"


@pytest.mark.parametrize("name", CALLS)
def test_what_our_pages_call_is_answered_as_by_one_node(sites: Sites, name: str) -> None:
    scope = "management" if CALLS[name][1].startswith("/models") else "inference"
    alone, ours = sites.ask(name, scope)
    assert alone.status == 200
    found = [each for each in differences(shown(ours), shown(alone)) if not each.startswith(OF_ONE_REPLICA)]
    assert not found, found
    assert ours.headers["pyserve-generation"]


@pytest.mark.parametrize("name", [each for each in CALLS if each != "health"])
@pytest.mark.parametrize("authorization", ["", "Bearer wrong", "wrong scope"])
def test_without_the_right_key_nobody_is_answered(sites: Sites, name: str, authorization: str) -> None:
    method, path, body, headers = CALLS[name]
    if authorization == "wrong scope":
        other = "inference" if path.startswith("/models") else "management"
        authorization = f"Bearer {KEYS[other]['key']}"
    given = {**headers, **({"Authorization": authorization} if authorization else {})}
    ours, alone = sites.nodes.ask(method, path, body, given), sites.server.ask(method, path, body, given)
    either = authorization in ALL_KEYS and name == "kserve, metadata"  # which both APIs have
    assert ours.status == alone.status == (200 if either else 401), (ours, alone)


def test_a_version_by_url_is_registered_and_unregistered_everywhere(sites: Sites, web: int) -> None:
    url = f"http://127.0.0.1:{web}/far.mar"
    registered = sites.managed("POST", f"/models?url={url}&initial_workers=1&synchronous=true")
    assert registered.status == 200, registered.body.decode()
    key = {"Authorization": f"Bearer {KEYS['inference']['key']}"}
    for _ in range(10):
        answer = sites.nodes.ask("POST", "/predictions/far", b"x", key)
        assert answer.status == 200 and b"upon" in answer.body
    assert {sites.managed("GET", "/models/far").json[0]["modelUrl"] for _ in range(6)} == {url}
    assert sites.managed("DELETE", "/models/far").status == 200
    assert {sites.nodes.ask("POST", "/predictions/far", b"x", key).status for _ in range(10)} == {404}


def test_settings_come_with_a_version(sites: Sites) -> None:
    """Which README's call changes where one node serves."""
    refused = sites.managed("PUT", "/models/linear?batch_size=8&max_batch_delay=20")
    assert refused.status == 405 and "in a cluster settings come with a version" in refused.body.decode()


def test_metrics_are_those_of_a_replica(sites: Sites) -> None:
    answer = sites.nodes.ask("GET", "/metrics?name[]=pyserve_queue_size&name[]=pyserve_worker_utilization")
    assert answer.status == 200
    assert {line.partition("{")[0] for line in answer.body.decode().splitlines() if not line.startswith("#")} == {
        "pyserve_queue_size", "pyserve_worker_utilization"
    }  # fmt: skip
