"""Planes of a rotary head, and latents in an order that lets fast planes read few of them.

A plane is two dimensions that rotate together; the first planes turn fastest. Rebuilding a plane
costs two products with the latents that it reads. Which latents those are is ours to choose: the
scores know k' D alone, so k' Q and Q^T D serve as well for any rotation Q, and Q of the QR
decomposition of D, its columns in the order of planes, makes Q^T D triangular: plane p then reads
the first 2 (p + 1) latents. Fast planes, which every decoded token rebuilds (`absorb.py`), cost
least.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def plane_order(head_size: int, rotary_dim: int, is_neox_style: bool) -> torch.Tensor:
    """Head dimensions as x0, y0, x1, y1, ..: rotary planes first, then the rest in pairs.

    Returns:
        int64, an even number of them: -1 fills the last plane of an odd `head_size`.
    """
    turning = torch.arange(rotary_dim)
    if is_neox_style:
        turning = turning.view(2, -1).t().flatten()
    order = torch.cat([turning, torch.arange(rotary_dim, head_size)])
    return functional.pad(order, (0, head_size % 2), value=-1)


def latent_order(head_size: int, rotary_dim: int, heads: int) -> torch.Tensor:
    """Dimensions of `heads` neighbouring heads that share a latent head, plane by plane.

    Returns:
        int64 `[heads * head_size]`; planes are (i, i + rotary_dim / 2).
    """
    order = plane_order(head_size, rotary_dim, is_neox_style=True)
    planes = order.view(-1, 1, 2) + head_size * torch.arange(heads)[:, None]
    return planes[(order >= 0).view(-1, 1, 2).expand_as(planes)]


def staircase(basis: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotation Q of latents after which the first dimensions in `order` read few of them.

    Args:
        basis: `[..., rank, size]`, takes latents to dimensions; rank <= size.
        order: int64 `[size]`.

    Returns:
        Q `[..., rank, rank]`, orthogonal, and `Q.mT @ basis`: its column `order[j]` is exactly zero
        past the first j + 1 rows.
    """
    rotation, rows = torch.linalg.qr(basis[..., order])
    turned = torch.empty_like(basis)
    turned[..., order] = rows
    return rotation, turned
