# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged cache of low-rank latents; see README.md in this folder.

`load("cpu")` gives the C++ kernels, `load("gpu")` the Triton ones, `load("reference")` those in
plain PyTorch; all satisfy `Kernels` and compute the same thing. Nothing here imports vLLM.
"""

from __future__ import annotations

from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels.interface import (
    DownProjection,
    Kernels,
    KeyReconstruction,
    Latents,
    LayerSpec,
    Limits,
    Plan,
    PlanGeometry,
    PreparedLayer,
    ScoreOptions,
    Step,
)
from vllm_eigen.kernels.rope import RotaryTable

__all__ = [
    "NAMES",
    "DownProjection",
    "Kernels",
    "KeyReconstruction",
    "Latents",
    "LayerSpec",
    "Limits",
    "Plan",
    "PlanGeometry",
    "PreparedLayer",
    "RotaryTable",
    "ScoreOptions",
    "Step",
    "load",
]

NAMES = ("reference", "cpu", "gpu")


def load(name: str) -> Kernels:
    """The kernels called `name`; "cpu" compiles its library on first use (seconds).

    Raises KernelError, in one line, for an unknown name or where the machine lacks what they need;
    falling back is the caller's decision, to be logged.
    """
    if name == "reference":
        from vllm_eigen.kernels.reference import ReferenceKernels

        return ReferenceKernels()
    if name == "cpu":
        from vllm_eigen.kernels.cpu.kernels import CpuKernels

        return CpuKernels()
    if name == "gpu":
        try:
            from vllm_eigen.kernels.gpu.kernels import GpuKernels
        except ImportError as error:
            raise KernelError(f"the gpu kernels need Triton: {error}") from error

        return GpuKernels()
    raise KernelError(f"unknown kernels {name!r}; choose one of {', '.join(NAMES)}")
