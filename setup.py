# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels in the wheel; all else of the build is in pyproject.toml.

EIGEN_WHEEL_KERNELS names the instruction-set levels to compile, or `all` those of this
architecture. Without it the wheel is pure Python and kernels are compiled on first use.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CPU = ROOT / "vllm_eigen" / "kernels" / "cpu"
WANTED = os.environ.get("EIGEN_WHEEL_KERNELS", "").split()


def _compiler():  # type: ignore[no-untyped-def]
    """The module without its package, which imports torch."""
    sys.path.insert(0, str(ROOT))  # for vllm_eigen.common.errors
    spec = importlib.util.spec_from_file_location("compiler", CPU / "compiler.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_py):
    """Compiles the levels wanted beside the Python files."""

    def run(self) -> None:
        """Compile what is not there yet, then copy as usual."""
        super().run()
        if WANTED and not self.editable_mode:
            compiler = _compiler()
            levels = compiler.machine_levels() if WANTED == ["all"] else WANTED
            folder = Path(self.build_lib, *CPU.relative_to(ROOT).parts, "lib")
            folder.mkdir(parents=True, exist_ok=True)
            for isa in levels:
                if not (folder / compiler.name_of_library(isa)).exists():
                    print(f"compiling the kernels for {isa}", flush=True)
                    compiler.build_library(isa, folder)


class PlatformWheel(bdist_wheel):
    """Of one machine's architecture, for every Python: the libraries are loaded with ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        """Tags of the wheel's name."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if WANTED else (python, abi, platform)


class KernelDistribution(Distribution):
    """Bound to an architecture only with libraries inside."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel is one of a platform."""
        return bool(WANTED)


setup(
    cmdclass={"build_py": BuildKernels, "bdist_wheel": PlatformWheel},
    distclass=KernelDistribution,
)
