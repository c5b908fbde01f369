# SPDX-License-Identifier: Apache-2.0
"""Compose files against the Compose specification, and the promises of `docs/deployment.md`."""

from __future__ import annotations

import argparse
import importlib.resources
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_eigen.benchmarks import command as benchmark

DOCKER = Path(__file__).resolve().parents[2] / "docker"
FILES = ("compose.yaml", "compose.gpu.yaml")
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
BUILD_ONLY = {"EIGEN_IMAGE", "EIGEN_START_PERIOD", "VLLM_NO_USAGE_STATS"}
"""Variables that `.env.example` leaves out: their defaults suit everyone."""


def load(name: str) -> dict[str, Any]:
    """A Compose file with its variables at their defaults."""
    text = VARIABLE.sub(lambda match: match[2] or "", (DOCKER / name).read_text())
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = load("compose.yaml")["services"]
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_specification_accepts_it(name: str) -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    import jsonschema

    schemas = importlib.resources.files("check_jsonschema.builtin_schemas.vendor")
    schema = json.loads((schemas / "compose-spec.json").read_text(encoding="utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(load(name))] == []
    broken = {"services": {"eigen": {"healthcheck": {"tests": []}}}}
    assert list(validator.iter_errors(broken)), "the schema must be able to refuse"


def test_profiles(services: dict[str, Any]) -> None:
    def members(profile: str) -> set[str]:
        return {name for name, service in services.items() if profile in service["profiles"]}

    assert members("eigen") == {"eigen"}
    assert members("baseline") == {"baseline"}
    assert members("compare") == {"eigen", "baseline", "load"}
    assert members("monitoring") == {"prometheus", "grafana"}


def test_every_server_restarts_and_is_checked_on_the_loopback(services: dict[str, Any]) -> None:
    servers = {name: service for name, service in services.items() if name != "load"}
    assert servers
    for name, service in servers.items():
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["ports"], name
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), (name, port)
    for name, service in services.items():
        image = service["image"]
        assert re.search(r":(v?\d+\.\d+\.\d+|cpu)$", image), (name, image)


def test_ours_write_to_volumes_and_memory_alone(services: dict[str, Any]) -> None:
    for name in ("eigen", "baseline", "load"):
        service = services[name]
        assert service["read_only"], name
        assert service["mem_limit"] == service["cpus"] == 0, name
        assert service["pids_limit"] > 0, name
        assert {item.split(":")[0] for item in service["tmpfs"]} == {"/tmp", "/home/eigen"}
        assert all("exec" in item for item in service["tmpfs"]), name


def test_the_servers_differ_in_the_compression_alone(services: dict[str, Any]) -> None:
    ours = {"EIGEN_KV_RATIO", "EIGEN_TEXT", "EIGEN_CALIBRATE_FLAGS"}
    eigen, baseline = (services[name]["environment"] for name in ("eigen", "baseline"))
    assert {key: value for key, value in eigen.items() if key not in ours} == {
        key: value for key, value in baseline.items() if key not in ours
    }
    assert baseline["EIGEN_KV_RATIO"] == "none"


def test_the_load_generator_waits_for_both_and_names_them(services: dict[str, Any]) -> None:
    load = services["load"]
    assert {name: wait["condition"] for name, wait in load["depends_on"].items()} == {
        "eigen": "service_healthy",
        "baseline": "service_healthy",
    }
    command = shlex.split(load["command"].replace('""', "/files/model"))
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    args = parser.parse_args(["serve", *command])
    assert (args.base_url, args.eigen_url) == ("http://baseline:8000", "http://eigen:8000")
    assert args.base == "/files/model"
    assert str(args.output) in {mount.split(":")[1] for mount in load["volumes"]}


def test_the_load_generator_gets_the_key_from_its_file(
    services: dict[str, Any], tmp_path: Path
) -> None:
    """Its shell runs, with a stand-in for the command and for the folder of secrets."""
    (tmp_path / "api_key").write_text("sk-secret\n")
    (tmp_path / "hf_token").write_text("")
    program = tmp_path / "vllm-eigen"
    program.write_text('#!/bin/sh\necho "$OPENAI_API_KEY:$HF_TOKEN:$*"')
    program.chmod(0o755)
    assert services["load"]["entrypoint"][:2] == ["tini", "--"]
    shell = [word.replace("$$", "$") for word in services["load"]["entrypoint"][2:]]
    shell[2] = shell[2].replace("/run/secrets", str(tmp_path))
    path = f"{tmp_path}:/bin:/usr/bin"
    done = subprocess.run(
        [*shell, "--base", "a b"], env={"PATH": path}, capture_output=True, text=True, timeout=20
    )
    assert done.stdout == "sk-secret::bench serve --base a b\n", done.stderr


def test_secrets_are_files_and_no_variables(services: dict[str, Any]) -> None:
    """Compose refuses other secrets for a container with a read-only root."""
    document = load("compose.yaml")
    assert set(document["secrets"]) == {"api_key", "hf_token", "grafana_password"}
    assert all(secret == {"file": "/dev/null"} for secret in document["secrets"].values())
    for name in ("eigen", "baseline", "load"):
        assert services[name]["secrets"] == ["api_key", "hf_token"], name
    for name, service in services.items():
        for variable in service.get("environment", {}):
            secret = re.search("KEY|TOKEN|PASSWORD", variable)
            assert not secret or variable.endswith("__FILE"), (name, variable)


def test_the_example_environment_is_complete() -> None:
    text = (DOCKER / ".env.example").read_text()
    example = dict(
        line.split("=", 1) for line in text.splitlines() if "=" in line[:30] and line[0] != "#"
    )
    used = {
        match[1]: match[2] or ""
        for name in FILES
        for match in VARIABLE.finditer((DOCKER / name).read_text())
    }
    assert set(example) == set(used) - BUILD_ONLY
    for secret in ("EIGEN_API_KEY_FILE", "HF_TOKEN_FILE", "GRAFANA_PASSWORD_FILE"):
        assert example[secret] == "/dev/null", secret
    assert (DOCKER / example["EIGEN_FILES"]).is_dir()
    assert example["EIGEN_MODEL"].endswith("/SmolLM2-135M-Instruct")


def test_what_is_mounted_exists_or_is_a_volume(services: dict[str, Any]) -> None:
    volumes = set(load("compose.yaml")["volumes"])
    mounts = [mount for service in services.values() for mount in service["volumes"]]
    used = set()
    for mount in mounts:
        source = mount.split(":")[0]
        if source.startswith("."):
            assert (DOCKER / source).exists(), source
        else:
            used.add(source)
    assert used == volumes


def test_a_gpu_for_each_server(services: dict[str, Any]) -> None:
    override = load("compose.gpu.yaml")["services"]
    assert set(override) == {"eigen", "baseline", "load"}
    for name in ("eigen", "baseline"):
        (device,) = override[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert device["capabilities"] == ["gpu"]
    for service in override.values():
        assert service["image"].endswith(":cuda")
        assert (DOCKER.parent / service["build"]["dockerfile"]).is_file()
    assert (DOCKER.parent / services["eigen"]["build"]["dockerfile"]).is_file()


def test_prometheus_scrapes_the_servers_there_are(services: dict[str, Any]) -> None:
    config = yaml.safe_load((DOCKER / "monitoring" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    targets = {target.split(":")[0] for each in job["static_configs"] for target in each["targets"]}
    assert targets == {"eigen", "baseline"}
    assert targets <= set(services)


def test_grafana_finds_its_source_and_its_dashboards(services: dict[str, Any]) -> None:
    mounts = dict(mount.split(":")[:2] for mount in services["grafana"]["volumes"])
    provisioning = DOCKER / next(
        source for source, place in mounts.items() if place == "/etc/grafana/provisioning"
    )
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())
    (source,) = sources["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert source["isDefault"]
    providers = yaml.safe_load((provisioning / "dashboards" / "vllm-eigen.yaml").read_text())
    (provider,) = providers["providers"]
    folder = provider["options"]["path"]
    shown = {place: source for source, place in mounts.items() if place.startswith(f"{folder}/")}
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in shown
    dashboard = json.loads((DOCKER / shown[home]).read_text())
    variables = {item["name"]: item for item in dashboard["templating"]["list"]}
    assert variables["datasource"]["query"] == source["type"]
