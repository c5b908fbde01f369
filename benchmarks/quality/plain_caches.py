# SPDX-License-Identifier: Apache-2.0
"""Caches that vLLM offers for any model: what attention reads back from them.

Simulated on full keys (after RoPE, where there is one) and values; the query stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from vllm_eigen.calibration.export.scales import fp8_cache
from vllm_eigen.calibration.model.hooks import LayerCache, Part
from vllm_eigen.common.errors import UsageError


@dataclass(frozen=True)
class PlainCache:
    """A cache element type.

    Attributes:
        bits: of an element.
        scale_bytes: of each token and head, for keys and values each.
        cache: what is read back from it.
    """

    bits: int
    scale_bytes: int
    cache: LayerCache

    def bytes_per_head(self, head_size: int) -> float:
        """Bytes of one head and token's key, or value."""
        return self.bits * head_size / 8 + self.scale_bytes


def _rounding(rounded: Callable[[torch.Tensor], torch.Tensor]) -> LayerCache:
    """Keys and values of every layer through one function of rows [.., head_size]."""

    def read_back(part: Part, latents: torch.Tensor) -> torch.Tensor:
        return rounded(latents)

    return lambda ranks: read_back


def _per_token_head(x: torch.Tensor, largest: int) -> torch.Tensor:
    """Integers from -largest to largest with one scale a token and head."""
    scale = (x.abs().amax(-1, keepdim=True) / largest).clamp(min=1e-12)
    return (x / scale).round().clamp(-largest, largest) * scale


def _int4(x: torch.Tensor) -> torch.Tensor:
    """4 bits from the least to the largest with an integer zero point, after random signs and a
    Hadamard transform: vLLM's `int4_per_token_head`."""
    rotation = _signed_hadamard(x.shape[-1]).to(x)
    rotated = x @ rotation
    least, most = rotated.amin(-1, keepdim=True), rotated.amax(-1, keepdim=True)
    scale = ((most - least) / 15).clamp(min=1e-6)
    zero = (-least / scale).round().clamp(0, 15)
    codes = ((rotated / scale).round() + zero).clamp(0, 15)
    return (codes - zero) * scale @ rotation.T


@cache
def _signed_hadamard(size: int) -> torch.Tensor:
    """Random signs, then Hadamard: orthogonal [size, size], size being a power of two."""
    if size & (size - 1):
        raise UsageError(f"int4 needs a head size that is a power of two, not {size}")
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    result: torch.Tensor = signs[:, None] * matrix / size**0.5
    return result


PLAIN_CACHES = {
    "bf16": PlainCache(16, 0, _rounding(lambda x: x.bfloat16().to(x.dtype))),
    # Scale 1, vLLM's default.
    "fp8": PlainCache(8, 0, fp8_cache),
    "int8": PlainCache(8, 4, _rounding(lambda x: _per_token_head(x, 127))),
    "int4": PlainCache(4, 4, _rounding(_int4)),
}
"""By the name in `--methods`; scales are float32 there."""
