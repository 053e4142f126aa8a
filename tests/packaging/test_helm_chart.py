"""`deploy/helm/pyserve`: rendered by Helm itself, from the package helm-python-sdk, and read by Kubernetes' schemas.

Where that is not installed the chart is NOT rendered: only its values are compared with their schema's names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyserve.config.keys import KINDS

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "helm/pyserve"
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
# Of objects that other projects define: no package has their schemas, so that they are compared with the manifests'.
FOREIGN = ("keda.sh", "monitoring.coreos.com")
OTHER_VALUES: dict[str, dict[str, Any]] = {
    "as they are": {},
    "everything": {
        "replicas": 3, "grpc": True, "keysSecret": "keys", "config": {"max_request_size": 10_000_000, "debug": True},
        "image": {"tag": "1.2"}, "imagePullSecrets": [{"name": "registry"}], "env": [{"name": "A", "value": "b"}],
        "envFrom": [{"secretRef": {"name": "more"}}], "podLabels": {"team": "a"}, "podAnnotations": {"a/b": "c"},
        "scratchSize": "20Gi", "nodeSelector": {"gpu": "yes"}, "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "a", "whenUnsatisfiable": "ScheduleAnyway"}],
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "16Gi"}}, "service": {"annotations": {"a": "b"}},
        "networkPolicy": {"from": [{"namespaceSelector": {}}]}, "disruptionBudget": {"maxUnavailable": "25%"},
        "autoscaling": {"kind": "hpa"}, "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    },
    "KEDA": {"autoscaling": {"kind": "keda", "min": 1, "max": 4, "targetWaitMs": 20}},
    "as little as can be": {
        "disruptionBudget": {"enabled": False}, "networkPolicy": {"enabled": False}, "resources": {},
        "models": {"volume": {"hostPath": {"path": "/srv"}}, "load": ["a.mar", "b=c.mar"]}, "fullnameOverride": "own",
    },
}  # fmt: skip


def rendered(values: dict[str, Any], name: str = "pyserve") -> dict[str, Any]:
    """What Helm makes of the chart, by kind."""
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed: the chart is NOT rendered")
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        texts = chart.render(values, name=name, namespace="models")
    found = [yaml.safe_load(text) for path, text in texts.items() if path.endswith(".yaml") and text.strip()]
    return {each["kind"]: each for each in found if each}


def plain(file: str) -> Any:
    return yaml.safe_load((DEPLOY / "kubernetes" / file).read_text())


def without(value: Any, *keys: str) -> Any:
    """``value`` with no such keys in any of its mappings."""
    if isinstance(value, dict):
        return {key: without(each, *keys) for key, each in value.items() if key not in keys}
    return [without(each, *keys) for each in value] if isinstance(value, list) else value


INSTANCE = ("app.kubernetes.io/instance", "app.kubernetes.io/version", "app.kubernetes.io/managed-by", "helm.sh/chart")


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_kubernetes_accepts_what_is_rendered(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: NOT checked")
    for document in rendered(OTHER_VALUES[name]).values():
        if not document["apiVersion"].startswith(FOREIGN):
            validate.validate(document, "1.30", strict=True)


def test_helm_finds_nothing_wrong() -> None:
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed: the chart is NOT read")
    for values in OTHER_VALUES.values():
        found = helm.lint(CHART, values, strict=True)
        wrong = [each for each in found["messages"] if "icon is recommended" not in str(each)]
        assert not wrong, wrong


def test_as_it_is_the_chart_is_what_the_manifests_are() -> None:
    found = {kind: without(each, *INSTANCE) for kind, each in rendered({}).items()}
    for kind, file in (("Service", "service.yaml"), ("PodDisruptionBudget", "disruption-budget.yaml"),
                       ("NetworkPolicy", "network-policy.yaml"), ("Deployment", "deployment.yaml")):  # fmt: skip
        ours, theirs = found.pop(kind)["spec"], plain(file)["spec"]
        if kind == "Service":
            assert ours.pop("type") == "ClusterIP"
        if kind == "Deployment":
            [container] = ours["template"]["spec"]["containers"]
            assert container.pop("imagePullPolicy") and container["image"] == "pyserve:0.1.0"
            container["image"] = "pyserve"
            assert container["env"].pop() == {"name": "PYSERVE_DRAIN_TIMEOUT_S", "value": "30"}
        assert ours == theirs, kind
    assert not found


def test_scaling_and_monitoring_are_as_in_the_manifests() -> None:
    found = rendered({"autoscaling": {"kind": "keda"}, "serviceMonitor": {"enabled": True}}, name="two")
    scaled, theirs = found["ScaledObject"]["spec"], plain("monitoring/scaled-object.yaml")["spec"]
    [trigger], [their_trigger] = scaled.pop("triggers"), theirs.pop("triggers")
    assert scaled.pop("scaleTargetRef") == {"name": found["Deployment"]["metadata"]["name"]} == {"name": "two-pyserve"}
    theirs.pop("scaleTargetRef")
    assert scaled == theirs
    query = trigger["metadata"].pop("query")
    assert query == ('avg(max by (pod) (pyserve_predicted_wait_seconds{namespace="models", service="two-pyserve"}))')
    their_trigger["metadata"].pop("query")
    assert trigger == their_trigger
    assert "replicas" not in found["Deployment"]["spec"], "an upgrade would undo what was scaled"
    monitor = found["ServiceMonitor"]["spec"]
    assert monitor["endpoints"] == plain("monitoring/service-monitor.yaml")["spec"]["endpoints"]
    assert found["Service"]["metadata"]["labels"][monitor["jobLabel"]] == "pyserve"
    assert monitor["selector"]["matchLabels"].items() <= found["Service"]["metadata"]["labels"].items()


def test_two_releases_select_their_own_pods() -> None:
    one, two = (rendered({}, name)["Service"]["spec"]["selector"] for name in ("one", "two"))
    assert one != two
    selectors = [each["spec"].get("podSelector") or each["spec"]["selector"] for each in rendered({}, "one").values()]
    assert all(each.get("matchLabels", each) == one for each in selectors)


def test_values_reach_the_server_as_they_were_meant() -> None:
    spec = rendered({
        "config": {"max_request_size": 10_000_000, "debug": True, "default_workers_per_model": 2, "models": {"a": {}}},
        "keysSecret": "k", "drainDelaySeconds": 20, "drainTimeoutSeconds": 100, "startupSeconds": 61,
        "models": {"load": ["all", "name=a b.mar"]}, "env": [{"name": "X", "value": "1"}],
    })["Deployment"]["spec"]["template"]["spec"]  # fmt: skip
    [container] = spec["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert environment == {
        "PYSERVE_DRAIN_DELAY_S": "20", "PYSERVE_DRAIN_TIMEOUT_S": "100", "PYSERVE_TOKEN_FILE": "/keys/keys.json",
        "PYSERVE_MAX_REQUEST_SIZE": "10000000", "PYSERVE_DEBUG": "true", "PYSERVE_DEFAULT_WORKERS_PER_MODEL": "2",
        "PYSERVE_MODELS": '{"a":{}}', "X": "1",
    }  # fmt: skip
    assert {name.removeprefix("PYSERVE_").lower() for name in environment if name != "X"} <= KINDS.keys()
    assert spec["terminationGracePeriodSeconds"] > 120 and container["startupProbe"]["failureThreshold"] * 2 > 60
    assert container["args"][5:7] == ["all", "name=a b.mar"]
    mounted = {each["name"] for each in container["volumeMounts"]}
    assert mounted == {each["name"] for each in spec["volumes"]} and "keys" in mounted


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"replica": 3}, "replica"),
        ({"autoscaling": {"kind": "always"}}, "kind"),
        ({"autoscaling": {"min": 5, "max": 2}}, "min is 5 and max is 2"),
        ({"config": {"inference_address": "http://0.0.0.0:1"}}, "inference_address"),
        ({"config": {"max-request-size": 1}}, "max-request-size"),
        ({"models": {"claim": ""}}, "models.claim"),
        ({"sharedMemorySize": "1 GB"}, "sharedMemorySize"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(values: dict[str, Any], text: str) -> None:
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed: the chart is NOT rendered")
    with pytest.raises(helm.HelmError) as raised:
        rendered(values)
    assert text in str(raised.value)


def test_the_schema_knows_every_value_and_no_other() -> None:
    def names(values: Any, schema: Any, place: str = "") -> list[str]:
        if schema.get("additionalProperties") is not False:
            return []
        known = schema["properties"].keys() - ({"global"} if not place else set())  # which Helm adds
        assert known == values.keys(), place
        return [name for name in values for name in names(values[name], schema["properties"][name], f"{place}.{name}")]

    names(VALUES, SCHEMA)
    assert set(SCHEMA["properties"]["config"]["propertyNames"]["not"]["enum"]) <= KINDS.keys()


def test_the_version_of_pyserve_is_the_images() -> None:
    import pyserve

    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == pyserve.__version__
