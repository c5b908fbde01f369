"""The Helm values: well-formed, in agreement with themselves, the entry point and the plugin."""

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

ROOT = Path(__file__).resolve().parents[2]
VALUES = ROOT / "docker" / "helm-values.yaml"

# Names that chart 0.1.12 knows, of those used here; a misspelt one it would ignore in silence.
KNOWN = {
    "": {"servingEngineSpec", "routerSpec"},
    "servingEngineSpec": {
        *("vllmApiKey", "securityContext", "containerSecurityContext", "modelSpec"),
        "startupProbe",
    },
    "modelSpec": {
        *("name", "repository", "tag", "modelURL", "replicaCount", "requestCPU", "requestMemory"),
        *("requestGPU", "pvcStorage", "pvcAccessMode", "storageClass", "hf_token"),
        *("initContainer", "vllmConfig", "env"),
    },
    "initContainer": {"name", "image", "args", "mountPvcStorage", "env", "resources"},
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


def environment(of: dict[str, Any]) -> dict[str, Any]:
    return {item["name"]: item.get("value") for item in of["env"]}


def test_only_names_that_the_chart_knows(values: dict[str, Any], model: dict[str, Any]) -> None:
    sections = {
        "": values,
        "servingEngineSpec": values["servingEngineSpec"],
        "modelSpec": model,
        "initContainer": model["initContainer"],
        "vllmConfig": model["vllmConfig"],
        "routerSpec": values["routerSpec"],
    }
    for name, section in sections.items():
        assert set(section) <= KNOWN[name], name


def test_the_init_container_makes_what_is_served(model: dict[str, Any]) -> None:
    init = model["initContainer"]
    assert environment(init)["EIGEN_CHECKPOINT"] == model["modelURL"]
    assert model["modelURL"].startswith("/data/"), "where the chart mounts the volume"
    assert init["mountPvcStorage"]
    assert init["image"] == f"{model['repository']}:{model['tag']}"
    assert model["tag"] == f"{vllm_eigen.__version__}-cuda"
    assert model["replicaCount"] == 1 or model["pvcAccessMode"] == ["ReadWriteMany"]


def test_the_entry_point_understands_its_environment(
    model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "docker"), *sys.path])
    entrypoint = importlib.import_module("entrypoint")
    given = {key: value or "" for key, value in environment(model["initContainer"]).items()}
    settings = entrypoint.read_settings(given)
    assert str(entrypoint.target(settings)) == model["modelURL"]
    assert model["initContainer"]["args"] == [entrypoint.CALIBRATE_ONLY]
    known = set(re.findall(r'"(EIGEN_\w+)"', (ROOT / "docker" / "entrypoint.py").read_text()))
    assert {key for key in given if key.startswith("EIGEN_")} <= known


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
