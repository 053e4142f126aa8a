"""`deploy/`: every file is checked by the tool that will read it, as far as it can be had, and against the others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
DASHBOARD = DEPLOY / "grafana/pyserve.json"
KUBERNETES_VERSION = "1.30"
# apt-get and pip take what is newest: versions pinned here would soon be those with known holes.
NOT_PINNED = ["--ignore=DL3008", "--ignore=DL3013"]
# A metric's name; what follows it in an expression is no part of it.
METRIC = re.compile(r"\b(?:pyserve|process)_[a-z0-9_]+")


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def run(*command: str | Path, cwd: Path = ROOT, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(each) for each in command], cwd=cwd, text=True, capture_output=True, timeout=120,
                          check=False, **more)  # fmt: skip


def needs(program: str) -> str:
    found = shutil.which(program, path=f"{os.environ['PATH']}:{Path(sys.executable).parent}:/usr/bin:/usr/sbin")
    if found is None:
        pytest.skip(f"{program} is not installed, so that what it reads is NOT checked")
    return found


def image_command() -> list[str]:
    """What a container runs if nothing else is said."""
    [command] = re.findall(r"^CMD (\[\"start.*?\])$", (DEPLOY / "Dockerfile").read_text().replace("\\\n", ""), re.M)
    parsed: list[str] = json.loads(command)
    return parsed


def expressions() -> dict[str, str]:
    """PromQL of the alerts, the dashboard and KEDA, by where it stands."""
    found = {}
    for rule in loaded(DEPLOY / "prometheus/alerts.yaml")["groups"][0]["rules"]:
        found[rule["alert"]] = rule["expr"]
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    [trigger] = loaded(DEPLOY / "kubernetes/monitoring/scaled-object.yaml")["spec"]["triggers"]
    found["scaled object"] = trigger["metadata"]["query"]
    return found


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    found = run(needs("hadolint"), "--no-color", *NOT_PINNED, DEPLOY / "Dockerfile")
    assert (found.returncode, found.stdout) == (0, ""), found.stdout + found.stderr


@pytest.mark.parametrize(
    ("given", "started"),
    [
        (["start", "--foreground", "a b"], "pyserve start --foreground a b"),
        (["status"], "pyserve status"),
        (["serve", "--models", "all"], "pyserve start --foreground --models all"),
        (["torchserve", "--start", "--ts-config", "f"], "torchserve --start --ts-config f"),
        (["pyserve", "doctor"], "pyserve doctor"),
        (["sh", "-c", "echo shell $0", "x y"], "shell x y"),
        (["/bin/echo", "as it is"], "as it is"),
    ],
)
def test_the_entrypoint_passes_on_what_it_is_given(tmp_path: Path, given: list[str], started: str) -> None:
    for name in ("pyserve", "torchserve"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\nexit 7\n')
        (tmp_path / name).chmod(0o755)
    ran = run(DEPLOY / "entrypoint.sh", *given, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert ran.stdout == started + "\n", ran.stderr
    assert ran.returncode == (7 if started.startswith(("pyserve", "torchserve")) else 0)


def test_the_entrypoint_leaves_its_process_to_the_server(tmp_path: Path) -> None:
    (tmp_path / "pyserve").write_text("#!/bin/sh\necho $$\n")
    (tmp_path / "pyserve").chmod(0o755)
    with subprocess.Popen([DEPLOY / "entrypoint.sh", "status"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, text=True,
                          stdout=subprocess.PIPE) as popen:  # fmt: skip
        said, _ = popen.communicate(timeout=60)
    assert int(said) == popen.pid, "signals of the container's engine would not reach it"


def test_all_start_it_with_flags_that_there_are_and_metrics_that_can_be_reached() -> None:
    from pyserve.commands.cli import _parser_of

    (container,) = loaded(DEPLOY / "kubernetes/deployment.yaml")["spec"]["template"]["spec"]["containers"]
    compose = loaded(DEPLOY / "compose.yaml")["services"]["pyserve"]
    assert image_command() == container["args"] == compose["command"]
    parsed = _parser_of("start").parse_args(image_command()[1:])
    assert parsed.foreground and parsed.metrics_address == "http://0.0.0.0:8082"
    assert parsed.management_address is None  # loopback
    [unit] = re.findall(r"^ExecStart=\S+ start (.*)$", (DEPLOY / "systemd/pyserve.service").read_text(), re.M)
    assert _parser_of("start").parse_args(unit.split()).foreground


def test_kubernetes_accepts_the_manifests() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: NOT checked")
    plain = [
        path for path in KUBERNETES if ".k8s.io/" not in loaded(path)["apiVersion"] or "networking" in path.read_text()
    ]
    plain = [path for path in plain if not loaded(path)["apiVersion"].startswith(("keda.sh", "monitoring.", "kustom"))]
    assert len(plain) == 4
    for path in plain:
        validate.validate(loaded(path), KUBERNETES_VERSION, strict=True)


def test_pods_are_locked_down_probed_and_given_time() -> None:
    spec = loaded(DEPLOY / "kubernetes/deployment.yaml")["spec"]
    pod, safety = spec["template"]["spec"], spec["template"]["spec"]["securityContext"]
    (container,) = pod["containers"]
    assert (
        safety["runAsNonRoot"]
        and f"USER {safety['runAsUser']}:{safety['runAsGroup']}" in (DEPLOY / "Dockerfile").read_text()
    )
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    assert [container[f"{each}Probe"]["httpGet"]["path"] for each in ("startup", "readiness", "liveness")] == [
        "/live", "/ready", "/live",
    ]  # fmt: skip
    [delay] = [each["value"] for each in container["env"] if each["name"] == "PYSERVE_DRAIN_DELAY_S"]
    assert pod["terminationGracePeriodSeconds"] > int(delay) + 30
    assert not pod["enableServiceLinks"]  # variables that begin with PYSERVE_ are ours


def test_selectors_ports_and_files_meet() -> None:
    labels = {"app.kubernetes.io/name": "pyserve"}
    documents = {path.stem: loaded(path) for path in KUBERNETES if path.stem != "kustomization"}
    deployment = documents["deployment"]["spec"]
    assert deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"] == labels
    assert documents["service"]["spec"]["selector"] == labels
    for name, key in (
        ("disruption-budget", "selector"),
        ("network-policy", "podSelector"),
        ("service-monitor", "selector"),
    ):
        assert documents[name]["spec"][key]["matchLabels"] == labels
    ports = {each["name"]: each["containerPort"] for each in deployment["template"]["spec"]["containers"][0]["ports"]}
    assert {each["targetPort"] for each in documents["service"]["spec"]["ports"]} == ports.keys()
    assert documents["service-monitor"]["spec"]["endpoints"][0]["port"] in ports
    assert documents["scaled-object"]["spec"]["scaleTargetRef"]["name"] == documents["deployment"]["metadata"]["name"]
    for folder in (DEPLOY / "kubernetes", DEPLOY / "kubernetes/monitoring"):
        named = {each for each in loaded(folder / "kustomization.yaml")["resources"] if each != ".."}
        assert named == {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}


def test_prometheus_takes_the_rules_and_they_fire() -> None:
    promtool = needs("promtool")
    for arguments in (["check", "config", "prometheus.yaml"], ["test", "rules", "alerts-test.yaml"]):
        checked = run(promtool, *arguments, cwd=DEPLOY / "prometheus")
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_reads_all_expressions(tmp_path: Path) -> None:
    promtool = needs("promtool")
    variables = {"$__rate_interval": "5m", "$instance": ".*", "$model": ".*"}
    rules = []
    for number, text in enumerate(expressions().values()):
        expression = re.sub(r"\$\w+", lambda found: variables[found[0]], text)
        rules.append({"record": f"r{number}", "expr": expression})
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    checked = run(promtool, "check", "rules", tmp_path / "rules.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_dashboards_panels_stand_beside_each_other() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y) for panel in panels for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]  # fmt: skip
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24


def test_systemd_reads_the_units(tmp_path: Path) -> None:
    analyze = needs("systemd-analyze")
    for path in (DEPLOY / "systemd").iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/pyserve/bin/pyserve", "/bin/true"))
    checked = run(analyze, "verify", "--man=no", tmp_path / "pyserve.service", tmp_path / "pyserve.socket")
    ours = [line for line in (checked.stdout + checked.stderr).splitlines() if "pyserve" in line]
    assert ours == [], checked.stderr
