# SPDX-License-Identifier: Apache-2.0
"""Optional packages: which extra installs one, and what to say where one is missing or broken.

The command line turns every import of a missing optional package into one line; nothing else needs
to catch it.
"""

from __future__ import annotations

import importlib
import re
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from vllm_eigen.common.errors import InstallError, first_line

DISTRIBUTION = "vllm-eigen"
CUDA_WHEELS = ("torchvision", "torchaudio", "torchcodec")
"""Packages that vLLM's CPU build asks for; the package index has them for CUDA alone."""
_FOR_DEVELOPERS = ("dev", "docs")


def extra_of(package: str) -> str | None:
    """The extra of this project that installs a package (its import name), by our own metadata."""
    try:
        requirements = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return None
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
        if name and extra and extra[1] not in _FOR_DEVELOPERS and _import_name(name[0]) == package:
            return extra[1]
    return None


def missing_package(error: ModuleNotFoundError, instead: str = "") -> InstallError | None:
    """What to say of a failed import, if an optional package of ours is not installed.

    Args:
        error: of the import.
        instead: what the user may do without the package, e.g. `or pass --text`.
    """
    package = (error.name or "").partition(".")[0]
    extra = extra_of(package)
    if extra is None or find_spec(package) is not None:
        return None
    message = f"this needs the package {package}; install {DISTRIBUTION}[{extra}]"
    return InstallError(f"{message}, {instead}" if instead else message)


def check_torchvision() -> None:
    """Refuse a torchvision that does not work: no model of transformers can be imported beside it.

    Raises:
        InstallError: it does not, with the command that removes it.
    """
    if find_spec("torchvision") is None or find_spec("torch") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        found = " ".join(name for name in CUDA_WHEELS if find_spec(name) is not None)
        raise InstallError(
            f"torchvision {version_of('torchvision')} does not work with torch "
            f"{version_of('torch')} ({first_line(error)}), so transformers cannot import models; "
            f"run: pip uninstall -y {found}"
        ) from error


def version_of(package: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _import_name(distribution: str) -> str:
    return distribution.replace("-", "_").lower()
