# SPDX-License-Identifier: Apache-2.0
"""The built wheel, installed alone: its contents, and its commands beside files of common names."""

from __future__ import annotations

import shutil
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests import small_llama
from tests.packaging.conftest import LIBRARIES, ROOT, Installed, run
from vllm_eigen.benchmarks.command import BENCHMARKS
from vllm_eigen.kernels.cpu import build, compiler

pytestmark = pytest.mark.deploy

COMMANDS = sorted(entry.name for entry in entry_points(group="vllm_eigen.commands"))
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])('.'))"


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"vllm_eigen"}
    packed = {name for name in names if ".dist-info/" not in name}
    for room in ("vllm_eigen", "calibration", "server", "benchmarks"):
        prefix = "" if room == "vllm_eigen" else "vllm_eigen/"
        for path in (ROOT / room).rglob("*.py"):
            assert prefix + path.relative_to(ROOT).as_posix() in packed
    for folder in ("vllm_eigen/kernels/cpu/csrc", "vllm_eigen/server/api/static"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert files
        assert {path.relative_to(ROOT).as_posix() for path in files} <= packed
    assert "vllm_eigen/py.typed" in packed
    assert [name for name in packed if name.endswith(".so")] == [
        f"{LIBRARIES}/{compiler.name_of_library(build.chosen_isa())}"
    ]
    assert wheel.name.split("-", 2)[2].startswith("py3-none-linux_")


def test_the_source_archive_builds_the_same_wheel(
    wheel: Path, source: Path, tmp_path: Path
) -> None:
    """But for the libraries, which it does not hold: this wheel is pure Python."""
    archive = run([sys.executable, "-c", BUILD, "build_sdist"], source).split()[-1]
    shutil.unpack_archive(source / archive, tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert (unpacked / "CHANGELOG.md").is_file()
    built = unpacked / run([sys.executable, "-c", BUILD, "build_wheel"], unpacked).split()[-1]
    assert built.name.endswith("-py3-none-any.whl")
    names = [set(zipfile.ZipFile(path).namelist()) for path in (wheel, built)]
    assert {name for name in names[0] if not name.endswith(".so")} == names[1]


def test_the_wheel_of_the_index_has_every_level(source: Path, tmp_path: Path) -> None:
    """With a source of one line, since a level of the kernels takes the compiler a minute."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed (apt install g++)")
    tree = shutil.copytree(source, tmp_path / "tree", symlinks=True)
    kernels = tree / "vllm_eigen" / "kernels" / "cpu"
    shutil.rmtree(kernels / "lib", ignore_errors=True)
    shutil.rmtree(kernels / "csrc")
    (kernels / "csrc").mkdir()
    (kernels / "csrc" / "kernels.cpp").write_text('extern "C" void vllm_eigen_describe() {}')
    environment = {"EIGEN_WHEEL_KERNELS": "all"}
    built = run([sys.executable, "-c", BUILD, "build_wheel"], tree, environment).split()[-1]
    names = [Path(name) for name in zipfile.ZipFile(tree / built).namelist()]
    levels = {path.name.split("-")[1] for path in names if path.parent.as_posix() == LIBRARIES}
    assert levels == set(compiler.machine_levels())


def test_every_command_explains_itself(installed: Installed) -> None:
    assert "vllm_eigen/__init__.py" in installed.run(
        "-c", "import vllm_eigen; print(vllm_eigen.__file__)"
    )
    overview = installed.run("-m", "vllm_eigen.cli", "--help")
    assert COMMANDS
    assert set(COMMANDS) <= set(overview.split())
    for name in COMMANDS:
        assert "usage:" in installed.run("-m", "vllm_eigen.cli", name, "--help").lower(), name
    overview = installed.run("-m", "vllm_eigen.cli", "bench", "--help")
    listed = {line.split()[0] for line in overview.splitlines() if line.startswith("    ")}
    assert set(BENCHMARKS) <= listed
    for name in BENCHMARKS:
        assert f"bench {name}" in installed.run("-m", "vllm_eigen.cli", "bench", name, "--help"), (
            name
        )


def test_a_command_runs(installed: Installed, tmp_path: Path) -> None:
    """The console script, on a model's configuration."""
    model = tmp_path / "model"
    small_llama.write(model)
    found = run([installed.script, "estimate", str(model), "--memory", "1GiB", "--kv-ratio", "0.6"])
    assert "0.6" in found


def test_vllm_finds_the_plugins(installed: Installed) -> None:
    pytest.importorskip("vllm")
    code = (
        "from importlib.metadata import entry_points\n"
        "for group in ('vllm.endpoint_plugins', 'vllm.general_plugins'):\n"
        "    for entry in entry_points(group=group):\n"
        "        if 'eigen' in entry.name: print(entry.load().__module__)\n"
    )
    assert installed.run("-c", code).split() == [
        "vllm_eigen.server.plugin",
        "vllm_eigen.plugin.register",
    ]
