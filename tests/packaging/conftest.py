# SPDX-License-Identifier: Apache-2.0
"""The wheel with the kernels of this machine, and an environment in which it alone is installed.

A user may stand in any folder, also in one with a `server.py` of their own. Dependencies are those
of the running environment, whose own installation of the project stays out of the way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import vllm_eigen
from vllm_eigen.kernels.cpu import build

ROOT = Path(vllm_eigen.__file__).parents[1]
LIBRARIES = "vllm_eigen/kernels/cpu/lib"
SECONDS = 400
_NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", ".demo", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "results"
)
_DECOYS = ("server", "calibration", "benchmarks", "demo")


def run(
    command: list[str], folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """What the command printed; it must end with 0."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**plain_environment(), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def plain_environment() -> dict[str, str]:
    """Of this process what a new login has, too."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR")
    return {name: os.environ[name] for name in kept if name in os.environ}


@dataclass(frozen=True)
class Installed:
    """The installed wheel: its interpreter, and a folder of decoys to run it in."""

    python: Path
    folder: Path

    @property
    def script(self) -> str:
        """The command `vllm-eigen`."""
        return str(self.python.with_name("vllm-eigen"))

    def run(self, *arguments: str) -> str:
        """Run the interpreter, which puts the folder first on its path; returns the output."""
        return run([str(self.python), *arguments], self.folder)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree to build in."""
    folder = tmp_path_factory.mktemp("wheel") / "source"
    return Path(shutil.copytree(ROOT, folder, symlinks=True, ignore=_NOT_SOURCE))


@pytest.fixture(scope="session")
def wheel(source: Path) -> Path:
    """Built as for the index, but with one library, which was compiled before."""
    if shutil.which("g++") is None and build.find(build.chosen_isa()) is None:
        pytest.skip("g++ is not installed (apt install g++)")
    isa = build.chosen_isa()
    (source / LIBRARIES).mkdir()
    shutil.copy(build.compiled(isa), source / LIBRARIES)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    folder = source.parent
    run(
        [*pip, "--no-index", "--wheel-dir", str(folder), str(source)],
        folder,
        {"EIGEN_WHEEL_KERNELS": isa},
    )
    (found,) = folder.glob("vllm_eigen-*.whl")
    return found


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in an environment of its own."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], folder)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", str(wheel)], folder)
    site = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    # Paths in a .pth file come last, and .pth files found there, such as that of an editable
    # installation, are not read.
    places = [path for path in sys.path if Path(path).name == "site-packages"]
    (Path(site.strip()) / "dependencies.pth").write_text("\n".join(places))
    work = folder / "work"
    work.mkdir()
    for name in _DECOYS:
        (work / f"{name}.py").write_text(f"raise ImportError('the decoy {name}.py')")
    return Installed(python, work)
