# SPDX-License-Identifier: Apache-2.0
"""Latents to integer codes and bytes, and back, in plain PyTorch: `checkpoint.codes` carried out.

The bytes of one head and token, in the reference's order: 8-bit codes, one a byte; 4-bit codes, two
a byte; 2-bit codes, four a byte; then the token scale, if any, as a little-endian bfloat16. Codes
are unsigned, earlier directions in lower bits. Other kernels may order the inside of a block
otherwise; what a cached latent stands for is the same everywhere.
"""

from __future__ import annotations

import torch

from vllm_eigen.checkpoint.codes import Code


def encode(x: torch.Tensor, code: Code) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes uint8 `[..., rank]` and scales float32 `[...]` of `x [..., rank]`.

    The scale is None without token scales. It is NaN where a number of the latent is; a NaN's code
    is that of 0. Division is that of float32.
    """
    x = x.float()
    levels = 2.0 ** torch.tensor(code.widths, device=x.device)
    scale = None
    if code.token_scale:
        scaled = code.eight + code.four
        needed = (x[..., :scaled].abs() / ((levels[:scaled] - 1) / 2)).amax(dim=-1)
        needed = torch.where(x.isnan().any(dim=-1), torch.nan, needed)
        floor = torch.tensor(code.scale_floor, dtype=torch.float32, device=x.device)
        scale = _rounded_up(torch.maximum(needed, floor))
        x = torch.where(scale[..., None] == 0, 0.0, x / scale[..., None])
    codes = (x.nan_to_num(0.0).floor() + levels / 2).clamp(torch.zeros_like(levels), levels - 1)
    return codes.to(torch.uint8), scale


def decode(codes: torch.Tensor, scale: torch.Tensor | None, code: Code) -> torch.Tensor:
    """Latents float32 `[..., rank]`."""
    levels = 2.0 ** torch.tensor(code.widths, device=codes.device)
    latents = codes.float() - (levels - 1) / 2
    return latents if scale is None else latents * scale[..., None]


def pack(codes: torch.Tensor, scale: torch.Tensor | None, code: Code) -> torch.Tensor:
    """Bytes uint8 `[..., code.num_bytes]` of what `encode` returns."""
    parts = []
    split = codes.split([count for _, count in code.counts()], dim=-1)
    for (width, _), some in zip(code.counts(), split, strict=True):
        fields = some.unflatten(-1, (-1, 8 // width))
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        parts.append((fields << shifts).sum(dim=-1, dtype=torch.uint8))
    if scale is not None:
        parts.append(scale.bfloat16()[..., None].view(torch.uint8))
    return torch.cat(parts, dim=-1)


def unpack(packed: torch.Tensor, code: Code) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes uint8 `[..., rank]` and scales float32 `[...]`, or None, of `pack`'s bytes."""
    parts, at = [], 0
    for width, count in code.counts():
        size = count * width // 8
        part = packed[..., at : at + size, None]
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        parts.append(((part >> shifts) & (2**width - 1)).flatten(-2))
        at += size
    codes = torch.cat(parts, dim=-1)
    if not code.token_scale:
        return codes, None
    scale = packed[..., at:].contiguous().view(torch.bfloat16)
    return codes, scale.squeeze(-1).float()


def to_bytes(x: torch.Tensor, code: Code) -> torch.Tensor:
    """What the cache keeps of latents `x [..., rank]`: uint8 `[..., code.num_bytes]`."""
    return pack(*encode(x, code), code)


def from_bytes(packed: torch.Tensor, code: Code) -> torch.Tensor:
    """What `packed`, by `to_bytes`, stands for: float32 `[..., rank]`."""
    return decode(*unpack(packed, code), code)


def _rounded_up(x: torch.Tensor) -> torch.Tensor:
    """Numbers not below 0 to the next bfloat16, as float32; NaN stays."""
    bits = x.view(torch.int32)
    up = ((bits + 0xFFFF) & -0x10000).view(torch.float32)
    return torch.where(x.isnan(), x, up)
