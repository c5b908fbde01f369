# SPDX-License-Identifier: Apache-2.0
"""The rotary embedding of captured queries, keys and gradients, and its inverse.

Half-split pairs as in transformers' Llama: element i rotates with element i + rotary_size / 2.
"""

from __future__ import annotations

import torch


def rotate(
    x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, *, back: bool = False
) -> torch.Tensor:
    """Rotate [batch, length, heads, head_size], or undo it; without tables `x` itself.

    Args:
        cos, sin: [batch or 1, length, rotary_size]; elements past `rotary_size` stay as they are.
        back: the inverse rotation.
    """
    if cos is None or sin is None:
        return x
    size = cos.shape[-1]
    rotary, rest = x[..., :size], x[..., size:]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    half = torch.cat([-rotary[..., size // 2 :], rotary[..., : size // 2]], dim=-1)
    # Tables may carry a scale (YaRN): its square is divided out of the inverse.
    result = rotary * cos - half * sin if back else rotary * cos + half * sin
    if back:
        result = result / (cos[..., :1] ** 2 + sin[..., :1] ** 2)
    return torch.cat([result, rest], dim=-1)
