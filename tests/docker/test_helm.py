# SPDX-License-Identifier: Apache-2.0
"""Kubernetes: Helm values and manifests agree with each other, the entry point and the plugin."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

import vllm_eigen
from vllm_eigen.server.commands.serve import DRAIN_SECONDS
from vllm_eigen.server.http.drain import CLOSE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
VALUES = ROOT / "docker" / "helm-values.yaml"
MANIFESTS = ROOT / "docker" / "kubernetes"
GRACE_SECONDS = 30
"""Kubernetes' own, which the chart does not change."""

# Names that chart 0.1.12 knows, of those used here; a misspelt one it would ignore in silence.
KNOWN = {
    "": {"servingEngineSpec", "routerSpec"},
    "servingEngineSpec": {
        *("vllmApiKey", "securityContext", "containerSecurityContext", "modelSpec"),
        "startupProbe",
    },
    "modelSpec": {
        *("name", "repository", "tag", "modelURL", "replicaCount", "requestCPU", "requestMemory"),
        *("requestGPU", "extraVolumes", "extraVolumeMounts", "vllmConfig", "env"),
    },
    "vllmConfig": {
        *("enablePrefixCaching", "maxModelLen", "dtype", "tensorParallelSize", "extraArgs"),
    },
    "routerSpec": {"replicaCount", "routingLogic"},
}


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(VALUES.read_text())
    return found


@pytest.fixture(scope="module")
def model(values: dict[str, Any]) -> dict[str, Any]:
    (found,) = values["servingEngineSpec"]["modelSpec"]
    return dict(found)


def manifests(name: str) -> dict[str, dict[str, Any]]:
    """The objects of a manifest by their kind."""
    text = (MANIFESTS / f"{name}.yaml").read_text()
    return {item["kind"]: item for item in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The container that calibrates."""
    (found,) = manifests("checkpoint")["Job"]["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.fixture(scope="module")
def server() -> dict[str, Any]:
    """The pod that serves."""
    return dict(manifests("server")["Deployment"]["spec"]["template"]["spec"])


def environment(of: dict[str, Any]) -> dict[str, Any]:
    return {item["name"]: item.get("value") for item in of["env"]}


def test_only_names_that_the_chart_knows(values: dict[str, Any], model: dict[str, Any]) -> None:
    sections = {
        "": values,
        "servingEngineSpec": values["servingEngineSpec"],
        "modelSpec": model,
        "vllmConfig": model["vllmConfig"],
        "routerSpec": values["routerSpec"],
    }
    for name, section in sections.items():
        assert set(section) <= KNOWN[name], name


def test_the_job_makes_what_is_served(
    model: dict[str, Any], job: dict[str, Any], server: dict[str, Any]
) -> None:
    made = environment(job)["EIGEN_CHECKPOINT"]
    assert model["modelURL"] == made
    assert "initContainer" not in model, "it would hold the GPU while it calibrates"
    (container,) = server["containers"]
    assert environment(container)["EIGEN_MODEL"] == made
    claim = manifests("checkpoint")["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for volumes, mounts in (
        (model["extraVolumes"], model["extraVolumeMounts"]),
        (server["volumes"], container["volumeMounts"]),
    ):
        names = {item["name"]: item.get("persistentVolumeClaim", {}) for item in volumes}
        (mount,) = [item for item in mounts if made.startswith(item["mountPath"])]
        assert names[mount["name"]]["claimName"] == claim["metadata"]["name"]
    tag = f"{vllm_eigen.__version__}-cuda"
    assert model["tag"] == tag
    images = {job["image"], container["image"], f"{model['repository']}:{tag}"}
    assert len(images) == 1


def test_the_entry_point_understands_its_environment(
    job: dict[str, Any], server: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "docker"), *sys.path])
    entrypoint = importlib.import_module("entrypoint")
    known = set(re.findall(r'"(EIGEN_\w+)"', (ROOT / "docker" / "entrypoint.py").read_text()))
    for container in (job, *server["containers"]):
        given = {key: value or "" for key, value in environment(container).items()}
        settings = entrypoint.read_settings(given)
        assert {key for key in given if key.startswith("EIGEN_")} <= known
    settings = entrypoint.read_settings({k: v or "" for k, v in environment(job).items()})
    assert str(entrypoint.target(settings)) == environment(job)["EIGEN_CHECKPOINT"]
    assert job["args"] == [entrypoint.CALIBRATE_ONLY]


def test_pods_are_killed_only_after_the_drain(
    model: dict[str, Any], server: dict[str, Any]
) -> None:
    def seconds(arguments: list[str]) -> int:
        return int(arguments[arguments.index("--shutdown-timeout") + 1])

    assert DRAIN_SECONDS + CLOSE_SECONDS < GRACE_SECONDS
    assert seconds(model["vllmConfig"]["extraArgs"]) + CLOSE_SECONDS < GRACE_SECONDS
    (container,) = server["containers"]
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    needed = before + seconds(container["args"]) + CLOSE_SECONDS
    assert needed < server["terminationGracePeriodSeconds"]
    probe = container["readinessProbe"]
    assert probe["httpGet"]["path"] == "/ready"
    assert probe["periodSeconds"] * probe["failureThreshold"] <= 1
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"


def test_compose_waits_longer_than_the_drain() -> None:
    text = (ROOT / "docker" / "compose.yaml").read_text()
    (grace,) = re.findall(r"stop_grace_period: (\d+)s", text)
    assert int(grace) > DRAIN_SECONDS + CLOSE_SECONDS


def test_pods_run_without_privileges(job: dict[str, Any], server: dict[str, Any]) -> None:
    for container in (job, *server["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_it_names_plugins_and_classes_that_exist(model: dict[str, Any]) -> None:
    groups = ("vllm.general_plugins", "vllm.endpoint_plugins")
    installed = {entry.name for group in groups for entry in entry_points(group=group)}
    assert set(environment(model)["VLLM_PLUGINS"].split(",")) <= installed
    arguments = model["vllmConfig"]["extraArgs"]
    assert all(isinstance(argument, str) for argument in arguments)
    path = arguments[arguments.index("--worker-extension-cls") + 1]
    module, name = path.rsplit(".", 1)
    text = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert f"class {name}" in text
