"""`deploy/ray-service.yaml`: its pods by Kubernetes' schemas, its Serve config by Ray's, its arguments by ours.

KubeRay's own schema is in no package: of what is KubeRay's only the names of fields are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pyserve.replicas.arguments import Arguments

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SERVICE: dict[str, Any] = yaml.safe_load((DEPLOY / "ray-service.yaml").read_text())
CLUSTER: dict[str, Any] = SERVICE["spec"]["rayClusterConfig"]
CONFIG: dict[str, Any] = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
ARGUMENTS = Arguments.of(CONFIG["applications"][0]["args"])
GROUPS = {"head": CLUSTER["headGroupSpec"], "engines": CLUSTER["workerGroupSpecs"][0]}


def test_fields_are_those_of_kuberay() -> None:
    """Of ray.io/v1, from its types."""
    assert (SERVICE["apiVersion"], SERVICE["kind"]) == ("ray.io/v1", "RayService")
    assert SERVICE["spec"].keys() == {"serveConfigV2", "rayClusterConfig"}
    assert CLUSTER.keys() <= {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
                              "workerGroupSpecs"}  # fmt: skip
    assert CLUSTER["autoscalerOptions"].keys() == {"idleTimeoutSeconds"}
    assert GROUPS["head"].keys() == {"rayStartParams", "template"}
    assert GROUPS["engines"].keys() == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams",
                                        "template"}  # fmt: skip
    assert all(isinstance(value, str) for group in GROUPS.values() for value in group["rayStartParams"].values())


@pytest.mark.parametrize("group", GROUPS)
def test_kubernetes_accepts_the_pods(group: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: NOT checked")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": GROUPS[group]["template"]["spec"]}
    validate.validate(pod, "1.30", strict=True)


@pytest.mark.parametrize("group", GROUPS)
def test_pods_are_locked_down_and_have_what_they_mount(group: str) -> None:
    spec = GROUPS[group]["template"]["spec"]
    [container] = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in spec["volumes"]}
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports["serve"] == CONFIG["http_options"]["port"]


def test_ray_accepts_the_serve_config() -> None:
    pytest.importorskip("ray", reason='ray is missing: NOT checked: pip install "ray[serve]"')
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(CONFIG)


def test_a_worker_has_room_for_one_replica_and_files_that_it_is_told_of() -> None:
    [worker] = GROUPS["engines"]["template"]["spec"]["containers"]
    mounted = {each["mountPath"] for each in worker["volumeMounts"]}
    assert ARGUMENTS.replicas_per_node == 1 and ARGUMENTS.num_cpus < int(worker["resources"]["requests"]["cpu"])
    assert ARGUMENTS.replicas_max <= GROUPS["engines"]["maxReplicas"]
    for path in (*ARGUMENTS.models, ARGUMENTS.config["token_file"]):
        assert str(Path(path).parent) in mounted
    assert GROUPS["head"]["rayStartParams"] == {"num-cpus": "0"}, "the head has no models"


def test_replicas_that_listen_on_all_interfaces_ask_for_a_key() -> None:
    """With HAProxy Ray lets each replica listen."""
    environment = {each["name"]: each["value"] for group in GROUPS.values()
                   for each in group["template"]["spec"]["containers"][0]["env"]}  # fmt: skip
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert "token_file" in ARGUMENTS.config


def test_the_version_of_ray_is_one_that_is_asked_for() -> None:
    project = (DEPLOY.parent / "pyproject.toml").read_text()
    assert f'"ray[serve]>={CLUSTER["rayVersion"].rpartition(".")[0]}"' in project
