"""`deploy/`: what Kubernetes is told, and a server as it says: one port, KServe's file, a stranger's user id."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.packaging.test_deployments import METRIC, expressions
from tests.support.ports import free_port
from tests.support.serving import JSON, NAMES, RAW, ROOT, Server
from tests.support.serving_models import write_linear

DEPLOY = ROOT / "deploy"


def test_the_runtime_is_locked_down_and_probes_paths_that_exist() -> None:
    runtime = yaml.safe_load((DEPLOY / "serving-runtime.yaml").read_text())["spec"]
    (container,) = runtime["containers"]
    safety = container["securityContext"]
    assert safety["runAsNonRoot"] and safety["readOnlyRootFilesystem"] and not safety["allowPrivilegeEscalation"]
    (mount,) = container["volumeMounts"]
    for each in container["env"]:
        assert each["value"].isdigit() or each["value"].startswith(mount["mountPath"])
    assert runtime["volumes"] == [{"name": mount["name"], "emptyDir": {}}]
    paths = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"/v2/health/live", "/v2/health/ready"}
    assert f":{container['ports'][0]['containerPort']}" in " ".join(container["args"])


def test_the_image_runs_as_nobody_special_and_ends_with_the_command() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"^USER (.*)$", text, re.M) == ["1000:1000"]
    assert text.count("\nFROM ") == 2 and "HEALTHCHECK" in text and 'ENTRYPOINT ["entrypoint.sh"]' in text


@pytest.fixture(scope="module")
def one_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """All APIs on one port, by the file that KServe writes, its addresses and folder replaced."""
    server = Server(tmp_path_factory.mktemp("one"))
    write_linear(server.store, "digits", file="digits")
    write_linear(server.store, "digits", version="2.0", seed=2, file="digits-2")
    text = (DEPLOY / "config.properties").read_text()
    text = re.sub(r"^(inference|management|metrics)_address=.*$", r"\1_address=http://127.0.0.1:0", text, flags=re.M)
    text = re.sub(r"^grpc_.*$", "", text, flags=re.M).replace("/mnt/models/model-store", str(server.store))
    config = server.folder / "config.properties"
    config.write_text(text)
    address = f"http://127.0.0.1:{free_port()}"
    names = [part for name in NAMES for part in (f"--{name}-address", address)]
    with server:
        server.start("--ts-config", str(config), "--enable-model-api", *names)
        yield server


@pytest.mark.server
def test_kserves_file_serves_its_snapshot(one_port: Server) -> None:
    assert one_port.ask("GET", "/models/digits").json[0]["batchSize"] == 4
    assert one_port.ask("GET", "/v2/health/ready").status == 200
    body = json.dumps({"instances": [[1, 2, 3, 4]]}).encode()
    assert one_port.ask("POST", "/v1/models/digits:predict", body, JSON).status == 200


@pytest.mark.server
def test_all_that_is_watched_is_there(one_port: Server) -> None:
    assert one_port.predict("digits", [1, 2, 3, 4]).status == 200
    text = one_port.ask("GET", "/metrics").body.decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
    there = set(kinds) | {f"{name}{end}" for name, kind in kinds.items() if kind == "histogram"
                          for end in ("_bucket", "_sum", "_count")}  # fmt: skip
    named = {name for text in expressions().values() for name in METRIC.findall(re.sub(r'"[^"]*"', "", text))}
    assert named - there == set()


READ_ONLY = """
set -e
mount --make-rprivate /
mount --bind "$0" "$0"
mount -o remount,bind,ro /
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""


@pytest.mark.server
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="only root can make its root read-only")
def test_a_server_without_rights_runs_on_a_read_only_root(tmp_path: Path) -> None:
    server = Server(tmp_path)
    write_linear(server.store)
    arguments = server.arguments("start", "--models", "linear.mar")
    probe = subprocess.run(["unshare", "-m", "sh", "-c", READ_ONLY, str(tmp_path), "sh", "-c", "! touch /etc/x"],
                           capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    if "unshare" in probe.stderr or "mount:" in probe.stderr:
        pytest.skip(f"no namespaces here: {probe.stderr}")
    assert probe.returncode == 0, probe.stderr
    environment = {**server.environment, "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    started = subprocess.run(["unshare", "-m", "sh", "-c", READ_ONLY, str(tmp_path), *arguments], env=environment,
                             cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    try:
        assert started.returncode == 0, started.stderr
        assert "CapEff:\t0000000000000000" in Path(f"/proc/{server.process.pid}/status").read_text()
        assert server.ask("POST", "/v2/models/linear/infer", bytes(16), RAW).status == 200
    finally:
        server.kill()


@pytest.mark.server
def test_sagemakers_calls_and_versions_on_one_port(one_port: Server) -> None:
    added = one_port.ask("POST", "/models?url=digits-2.mar&initial_workers=1")
    assert added.status == 200, added.body
    assert one_port.ask("GET", "/ping").status == 200
    plain = one_port.ask("POST", "/predictions/digits", bytes(16), RAW).body
    for path in ("/models/digits/invoke", "/invocations", "/invocations?model_name=digits"):
        assert one_port.ask("POST", path, bytes(16), RAW).body == plain, path
    assert one_port.ask("GET", "/models/digits/2.0").json[0]["modelVersion"] == "2.0"
    assert one_port.ask("PUT", "/models/digits/2.0?min_worker=1&synchronous=true").status == 200
    assert one_port.ask("DELETE", "/models/digits/2.0").status == 200
    assert one_port.ask("GET", "/models/digits/2.0").status == 404
    assert one_port.ask("GET", "/metrics").status == 200
