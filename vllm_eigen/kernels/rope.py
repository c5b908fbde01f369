# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: its table, the order of RoPE pairs, and latents in triangular order.

A RoPE pair is two dimensions of a head that rotate together; the first pairs rotate fastest.
Reconstructing a pair costs two products with the latents that it reads. Which latents those are is
free: the scores know k' D alone, so k' Q and Q^T D serve as well for any orthogonal Q. With Q of
the QR decomposition of D, its columns in the order of pairs, Q^T D is triangular: pair p of a head
reads the first 2 (p + 1) latents. Fast pairs, which every decoded token reconstructs
(`cpu/absorb.py`), cost least.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class RotaryTable:
    """Cosines and sines by position. Layers that rotate alike should share one object.

    cos_sin: float32 `[max_position, rotary_dim]`, cosines, then sines, of each pair; a scaled
        table (YaRN's attention factor) is allowed.
    frequencies: radians a token of each of the rotary_dim / 2 pairs. None for a pair that is not
        one even rotation of its angle at position 0, or for all of them (tables of several
        regimes or of rounded cosines): such pairs are read from the table alone.
    is_neox_style: pairs are (i, i + rotary_dim / 2); otherwise (2i, 2i + 1).
    """

    cos_sin: torch.Tensor
    frequencies: tuple[float | None, ...] | None = None
    is_neox_style: bool = True

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that rotate."""
        return int(self.cos_sin.shape[1])

    @property
    def max_position(self) -> int:
        """Positions in the table."""
        return int(self.cos_sin.shape[0])

    @classmethod
    def from_frequencies(
        cls, frequencies: torch.Tensor, max_position: int, is_neox_style: bool = True
    ) -> RotaryTable:
        """The table of plain RoPE. frequencies: `[rotary_dim / 2]`, radians a token."""
        angles = torch.arange(max_position)[:, None] * frequencies
        return cls(
            torch.cat([angles.cos(), angles.sin()], dim=-1).float(),
            tuple(frequencies.double().tolist()),
            is_neox_style,
        )


def even_frequencies(cos_sin: torch.Tensor) -> tuple[float | None, ...]:
    """Radians a token of each pair of a float table, read off the table itself.

    The frequency at which row p is row 0 rotated by p times it, up to float32 rounding; None for a
    pair without one. The angles of rows 1, 2, 4, .. each tell it twice as exactly as the last one.

    Args:
        cos_sin: `[max_position, rotary_dim]`.
    """
    cos, sin = cos_sin.double().chunk(2, dim=-1)
    first = torch.complex(cos[0], sin[0])
    frequency = torch.zeros_like(cos[0])
    row = 1
    while row < len(cos):
        found = torch.complex(cos[row], sin[row])
        frequency += (found * (first * torch.exp(1j * row * frequency)).conj()).angle() / row
        row *= 2
    # The mean over a few thousand rows, weighted by position.
    rows = torch.arange(0, len(cos), 1 + len(cos) // 4096, device=cos.device)
    found = torch.complex(cos[rows], sin[rows])
    rest = (found * (first * torch.exp(1j * rows[:, None] * frequency)).conj()).angle()
    frequency += (rows[:, None] * rest).sum(0) / rows.double().square().sum().clamp(min=1)
    angles = torch.arange(len(cos), dtype=torch.float64, device=cos.device)[:, None] * frequency
    turned_cos, turned_sin = angles.cos(), angles.sin()
    off_cos = first.real * turned_cos - first.imag * turned_sin - cos
    off_sin = first.real * turned_sin + first.imag * turned_cos - sin
    # A float32 angle is rounded by 2^-24 of itself, and its cosine by 2^-24.
    allowed = first.abs() * (4e-6 + angles.abs() * 2.0**-22)
    even = ((off_cos.square() + off_sin.square()).sqrt() <= allowed).all(0) & (first.abs() > 0)
    pairs = zip(frequency.tolist(), even.tolist(), strict=True)
    return tuple(value if kept else None for value, kept in pairs)


def pair_order(head_size: int, rotary_dim: int, is_neox_style: bool) -> torch.Tensor:
    """Head dimensions as x0, y0, x1, y1, ..: RoPE pairs first, then the rest two by two.

    Returns:
        int64, an even number of them: -1 fills the last pair of an odd `head_size`.
    """
    rotary = torch.arange(rotary_dim)
    if is_neox_style:
        rotary = rotary.view(2, -1).t().flatten()
    order = torch.cat([rotary, torch.arange(rotary_dim, head_size)])
    return functional.pad(order, (0, head_size % 2), value=-1)


def latent_order(
    head_size: int, rotary_dim: int, heads: int, is_neox_style: bool = True
) -> torch.Tensor:
    """Dimensions of `heads` neighbouring heads that share a latent head, pair by pair.

    Returns:
        int64 `[heads * head_size]`.
    """
    order = pair_order(head_size, rotary_dim, is_neox_style)
    pairs = order.view(-1, 1, 2) + head_size * torch.arange(heads)[:, None]
    return pairs[(order >= 0).view(-1, 1, 2).expand_as(pairs)]


def triangular_order(basis: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotation Q of latents after which the first dimensions in `order` read few of them (QR).

    Args:
        basis: `[..., rank, size]`, takes latents to dimensions; rank <= size.
        order: int64 `[size]`.

    Returns:
        Q `[..., rank, rank]`, orthogonal, and `Q.mT @ basis`: its column `order[j]` is exactly zero
        past the first j + 1 rows.
    """
    rotation, rows = torch.linalg.qr(basis[..., order])
    rotated = torch.empty_like(basis)
    rotated[..., order] = rows
    return rotation, rotated
