# SPDX-License-Identifier: Apache-2.0
"""The built wheel, installed alone: its contents, and its commands beside files of common names.

A user may stand in any folder, also in one with a `server.py` of their own. Dependencies are those
of the running environment, whose own installation of the project stays out of the way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import vllm_eigen
from tests import small_llama
from vllm_eigen.benchmarks.command import BENCHMARKS

pytestmark = pytest.mark.deploy

ROOT = Path(vllm_eigen.__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", ".demo", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "results"
)
DECOYS = ("server", "calibration", "benchmarks", "demo")
COMMANDS = sorted(entry.name for entry in entry_points(group="vllm_eigen.commands"))
SECONDS = 240

Python = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=NOT_SOURCE)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    _run([*pip, "--no-index", "--wheel-dir", str(folder), str(folder / "source")], folder)
    (found,) = folder.glob("vllm_eigen-*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Python:
    """Runs the installed wheel's interpreter in a folder of decoys; returns what it printed."""
    folder = tmp_path_factory.mktemp("installed")
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], folder)
    interpreter = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet"]
    _run([*pip, "--no-deps", "--no-index", str(wheel)], folder)
    site = _run([str(interpreter), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    # A path in a .pth file comes last, and .pth files found there, such as that of an editable
    # installation, are not read.
    (Path(site.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    work = folder / "work"
    work.mkdir()
    for name in DECOYS:
        (work / f"{name}.py").write_text(f"raise ImportError('the decoy {name}.py')")

    def run(*arguments: str) -> str:
        # The interpreter puts the folder first on its path.
        return _run([str(interpreter), *arguments], work)

    return run


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


def test_the_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    build = (
        "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])('.'))"
    )
    source = wheel.parent / "source"
    archive = _run([sys.executable, "-c", build, "build_sdist"], source).split()[-1]
    shutil.unpack_archive(source / archive, tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert (unpacked / "CHANGELOG.md").is_file()
    built = _run([sys.executable, "-c", build, "build_wheel"], unpacked).split()[-1]
    names = [set(zipfile.ZipFile(path).namelist()) for path in (wheel, unpacked / built)]
    assert names[0] == names[1]


def test_every_command_explains_itself(python: Python) -> None:
    assert "vllm_eigen/__init__.py" in python("-c", "import vllm_eigen; print(vllm_eigen.__file__)")
    overview = python("-m", "vllm_eigen.cli", "--help")
    assert COMMANDS
    assert set(COMMANDS) <= set(overview.split())
    for name in COMMANDS:
        assert "usage:" in python("-m", "vllm_eigen.cli", name, "--help").lower(), name
    overview = python("-m", "vllm_eigen.cli", "bench", "--help")
    listed = {line.split()[0] for line in overview.splitlines() if line.startswith("    ")}
    assert set(BENCHMARKS) <= listed
    for name in BENCHMARKS:
        assert f"bench {name}" in python("-m", "vllm_eigen.cli", "bench", name, "--help"), name


def test_a_command_runs(python: Python, tmp_path: Path) -> None:
    """The console script, on a model's configuration."""
    model = tmp_path / "model"
    small_llama.write(model)
    script = python("-c", "import sys; print(sys.prefix)").strip() + "/bin/vllm-eigen"
    found = _run([script, "estimate", str(model), "--memory", "1GiB", "--kv-ratio", "0.6"])
    assert "0.6" in found


def test_vllm_finds_the_plugins(python: Python) -> None:
    pytest.importorskip("vllm")
    code = (
        "from importlib.metadata import entry_points\n"
        "for group in ('vllm.endpoint_plugins', 'vllm.general_plugins'):\n"
        "    for entry in entry_points(group=group):\n"
        "        if 'eigen' in entry.name: print(entry.load().__module__)\n"
    )
    assert python("-c", code).split() == ["vllm_eigen.server.plugin", "vllm_eigen.plugin.register"]


def _run(command: list[str], folder: Path | None = None) -> str:
    kept = ("PATH", "HOME", "LANG", "TMPDIR")
    done = subprocess.run(
        command,
        cwd=folder,
        env={name: os.environ[name] for name in kept if name in os.environ},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout
