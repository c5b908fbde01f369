# SPDX-License-Identifier: Apache-2.0
"""Kubernetes: our chart rendered by Helm, and the values for the production stack.

Core objects are compared with Kubernetes' own schemas; those of the Prometheus operator and of KEDA
with the metrics that there are.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

import vllm_eigen
from vllm_eigen.server.commands.serve import DRAIN_SECONDS
from vllm_eigen.server.http.drain import CLOSE_SECONDS
from vllm_eigen.server.stats.gauges import GAUGES

ROOT = Path(__file__).resolve().parents[2]
VALUES = ROOT / "docker" / "helm-values.yaml"
CHART = ROOT / "docker" / "chart"
Render = Callable[..., dict[tuple[str, str], dict[str, Any]]]
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


@pytest.fixture(scope="module")
def render() -> Iterator[Render]:
    """Renders the chart with changed values; returns the objects by kind and name."""
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
    with helm.Chart.load(str(CHART)) as chart:

        def rendered(**changes: Any) -> dict[tuple[str, str], dict[str, Any]]:
            found = chart.render(changes, name="eigen", namespace="prod")
            texts = [text for name, text in found.items() if name.endswith(".yaml")]
            items = [item for text in texts for item in yaml.safe_load_all(text) if item]
            objects = {(item["kind"], item["metadata"]["name"]): item for item in items}
            assert len(objects) == len(items)
            return objects

        yield rendered


def of_kind(objects: dict[tuple[str, str], dict[str, Any]], kind: str) -> dict[str, Any]:
    """The only object of a kind."""
    (found,) = [item for (name, _), item in objects.items() if name == kind]
    return found


@pytest.fixture(scope="module")
def job(render: Render) -> dict[str, Any]:
    """The container that calibrates."""
    (found,) = of_kind(render(), "Job")["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.fixture(scope="module")
def server(render: Render) -> dict[str, Any]:
    """The pod that serves."""
    return dict(of_kind(render(), "Deployment")["spec"]["template"]["spec"])


def environment(of: dict[str, Any]) -> dict[str, Any]:
    return {item["name"]: item.get("value") for item in of["env"]}


OTHERS = {"monitoring.coreos.com", "keda.sh"}
"""Groups of objects that Kubernetes has no schema of."""
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "calibrating": {"server": {"enabled": False}},
    "hpa": {"scaling": {"kind": "hpa"}, "monitoring": {"enabled": True, "labels": {"a": "b"}}},
    "keda": {"scaling": {"kind": "keda"}, "networkPolicy": {"to": [{"podSelector": {}}]}},
    "openshift": {
        "podSecurity": {"runAsUser": None, "fsGroup": None},
        "checkpoints": {"existingClaim": "mine"},
        "image": {"pullSecrets": [{"name": "registry"}]},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "nodeSelector": {"gpu": "h100"},
        "server": {"env": [{"name": "EIGEN_KERNELS", "value": "gpu"}]},
    },
}


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_kubernetes_accepts_what_helm_renders(render: Render, values: dict[str, Any]) -> None:
    helm = pytest.importorskip("helm_python")
    kubernetes = pytest.importorskip("kubernetes_validate")
    report = helm.lint(str(CHART), values, strict=True)
    assert (report["errors"], report["total_charts_linted"]) == ([], 1)
    objects = render(**values)
    core = [item for item in objects.values() if item["apiVersion"].split("/")[0] not in OTHERS]
    assert len(core) > 2
    for item in core:
        for version in ("1.27", "1.36"):
            kubernetes.validate(item, version, strict=True)


def test_a_schema_that_finds_nothing_would_be_no_check(render: Render) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    deployment = copy.deepcopy(of_kind(render(), "Deployment"))
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(deployment, "1.36", strict=True)


@pytest.mark.parametrize(
    "values",
    [{"sever": {}}, {"server": {"replica": 2}}, {"kvRatio": "2"}, {"scaling": {"kind": "vpa"}}],
    ids=str,
)
def test_misspelt_values_are_refused(render: Render, values: dict[str, Any]) -> None:
    helm = pytest.importorskip("helm_python")
    with pytest.raises(helm.HelmError):
        render(**values)


def test_no_server_holds_a_gpu_while_it_is_calibrated(render: Render) -> None:
    kinds = {kind for kind, _ in render(server={"enabled": False})}
    assert kinds == {"PersistentVolumeClaim", "Job", "NetworkPolicy"}


def test_another_model_or_image_makes_another_job(render: Render) -> None:
    names = {
        of_kind(render(**values), "Job")["metadata"]["name"]
        for values in ({}, {"kvRatio": "0.34"}, {"image": {"tag": "0.2.0-cuda"}})
    }
    assert len(names) == 3


@pytest.mark.parametrize("kind", ["hpa", "keda"])
def test_scaling_and_alerts_ask_for_metrics_there_are(render: Render, kind: str) -> None:
    vllm = importlib.util.find_spec("vllm")  # importing it takes seconds
    if vllm is None or vllm.origin is None:
        pytest.skip("vLLM is not installed")
    loggers = Path(vllm.origin).parent / "v1" / "metrics" / "loggers.py"
    objects = render(scaling={"kind": kind}, monitoring={"enabled": True})
    text = yaml.safe_dump(list(objects.values()))
    theirs = set(re.findall(r'"vllm:(\w+)"', loggers.read_text()))
    ours = {name for name, _, _ in GAUGES}
    # Prometheus' client ends a counter's name with _total; an adapter takes no colon.
    asked = {name.removesuffix("_total") for name in re.findall(r"\bvllm[:_](?!eigen)(\w+)", text)}
    assert {"num_requests_waiting", "kv_cache_usage_perc", "num_preemptions"} <= asked
    assert asked <= theirs
    assert set(re.findall(r"vllm_eigen:(\w+)", text)) <= ours
    # The name of the metrics is the first that the server is given.
    (container,) = of_kind(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    served = container["args"][container["args"].index("--served-model-name") + 1]
    assert set(re.findall(r'model_name=\\?"([^"\\]+)', text)) == {served}
    assert "replicas" not in of_kind(objects, "Deployment")["spec"], "it would undo the scaling"


def test_the_monitor_the_service_and_the_policies_find_their_pods(render: Render) -> None:
    objects = render(monitoring={"enabled": True})
    pods = of_kind(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    service = of_kind(objects, "Service")
    for selector in (
        service["spec"]["selector"],
        of_kind(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy", "eigen-server"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= pods.items()
    monitor = of_kind(objects, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    job_pods = of_kind(objects, "Job")["spec"]["template"]["metadata"]["labels"]
    policy = objects["NetworkPolicy", "eigen-calibrate"]["spec"]["podSelector"]["matchLabels"]
    assert policy.items() <= job_pods.items()
    assert not policy.items() <= pods.items()


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
    model: dict[str, Any], job: dict[str, Any], server: dict[str, Any], render: Render
) -> None:
    made = environment(job)["EIGEN_CHECKPOINT"]
    assert model["modelURL"] == made, "a release named eigen makes it"
    assert "initContainer" not in model, "it would hold the GPU while it calibrates"
    (container,) = server["containers"]
    assert environment(container)["EIGEN_MODEL"] == made
    claim = of_kind(render(), "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
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
