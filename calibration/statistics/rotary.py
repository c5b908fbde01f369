# SPDX-License-Identifier: Apache-2.0
"""The rotary embedding of captured queries, keys and gradients, and its inverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotary embedding at some positions.

    Attributes:
        cos, sin: of each RoPE pair, [batch or 1, length, rotary_size / 2]. They may carry a scale
            (YaRN).
        interleaved: whether pairs are neighbours, (2 i, 2 i + 1), and not halves of what rotates,
            (i, i + rotary_size / 2).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False

    def to(self, other: torch.Tensor) -> Rotation:
        """With tables of another tensor's device and type."""
        return Rotation(self.cos.to(other), self.sin.to(other), self.interleaved)

    def cpu(self) -> Rotation:
        """With tables on the CPU."""
        return Rotation(self.cos.cpu(), self.sin.cpu(), self.interleaved)


def rotate(x: torch.Tensor, rotation: Rotation | None, *, back: bool = False) -> torch.Tensor:
    """Rotate [batch, length, heads, head_size], or undo it; without a rotation `x` itself.

    Elements past `rotary_size` stay as they are.

    Args:
        back: the inverse rotation.
    """
    if rotation is None:
        return x
    cos, sin = rotation.cos.unsqueeze(-2), rotation.sin.unsqueeze(-2)
    if back:
        scale = cos[..., :1] ** 2 + sin[..., :1] ** 2
        cos, sin = cos / scale, -sin / scale
    size = 2 * cos.shape[-1]
    rotary, rest = x[..., :size], x[..., size:]
    if rotation.interleaved:
        first, second = rotary.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        first, second = rotary.chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    if rotation.interleaved:
        return torch.cat([torch.stack(turned, dim=-1).flatten(-2), rest], dim=-1)
    return torch.cat([*turned, rest], dim=-1)
