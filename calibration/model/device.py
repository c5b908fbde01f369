# SPDX-License-Identifier: Apache-2.0
"""The device that layers run on, and how many tokens it takes in one forward call."""

from __future__ import annotations

import torch

from vllm_eigen.common.errors import UsageError

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of one forward call, in whole windows, by device type."""


def pick_device(name: str) -> torch.device:
    """The device called `auto`, `cpu` or `cuda`.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is visible; use --device cpu")
    if name not in BATCH_TOKENS:
        raise UsageError(f"--device {name} is unknown; choose cpu, cuda or auto")
    return torch.device(name)


def batch_windows(device: torch.device, length: int) -> int:
    """Windows of one forward call."""
    return max(1, BATCH_TOKENS[device.type] // length)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
