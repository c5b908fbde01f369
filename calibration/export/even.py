# SPDX-License-Identifier: Apache-2.0
"""Latents in triangular order, made as even as that order allows, for an 8-bit cache.

Rounding that is relative to the size of a latent costs sum_j (A^T L A)_jj (A^-1 L A^-T)_jj in the
method's metric, L being diagonal and A what turns its latents (`methods.sensitivity`). The rotation
that makes all latents alike is best; the one to triangular order (`kernels.rope`) costs 1.9 times
as much on SmolLM2. After it, an upper triangular V keeps decoders triangular,

    k_hat = (k' V) (V^-1 D),

and brings that to 1.1 times. The product of encoder and decoder does not change.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_eigen.calibration.methods.basis import Basis, LayerBases, LayerMaps, Maps
from vllm_eigen.calibration.methods.sensitivity import SCALE_FLOOR
from vllm_eigen.calibration.truncated import TruncatedModel
from vllm_eigen.kernels.rope import triangular_order

_SWEEPS = 30
_ENOUGH = 1e-3
"""Relative gain of a sweep below which no more follow."""


def even_out(compressed: TruncatedModel) -> TruncatedModel:
    """The same model with even key latents, where they are in triangular order."""
    bases: list[LayerBases | LayerMaps] = []
    for item, rank in zip(compressed.bases, compressed.ranks, strict=True):
        if isinstance(item, LayerBases) and len(item.key.order) and bool(item.key.equalized):
            item = replace(item.at(rank), key=_even_maps(item.key, rank.rank_k))
        bases.append(item)
    return replace(compressed, bases=tuple(bases))


def _even_maps(basis: Basis, rank: int) -> Maps:
    if rank == basis.full_rank:
        return basis.at(rank)  # the identity
    rotation, decoder = triangular_order(basis.decoder[:, :rank], basis.order)
    energy, largest = basis.energy[:, :rank], basis.energy[:, :1]
    # The method's latents have this variance, and their decoders this size in its metric.
    size = torch.where(largest > 0, (energy / largest).clamp(min=SCALE_FLOOR), 1.0).sqrt()
    upper, inverse = even_triangle(rotation.mT @ (size[..., None] * rotation))
    return basis.encoder[:, :, :rank] @ rotation @ upper, inverse @ decoder


def even_triangle(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper triangular V of least sum_j (V^T C V)_jj (V^-1 C V^-T)_jj, and its inverse.

    Adding multiples of column i to all later ones is a quadratic problem in the multiples; sweeps
    over i never raise the cost. At last V^T C V gets a diagonal of equal elements.

    Args:
        moment: C, symmetric positive definite, [.., rank, rank].
    """
    rank = moment.shape[-1]
    upper = torch.eye(rank, dtype=moment.dtype).expand_as(moment).clone()
    inverse, left, right = upper.clone(), moment.clone(), moment.clone()
    cost = _diagonal_cost(left, right)
    for _ in range(_SWEEPS):
        for i in range(rank - 1):
            later = slice(i + 1, None)
            size, weight = left[..., i, i], right[..., later, later].diagonal(dim1=-2, dim2=-1)
            system = size[..., None, None] * (torch.diag_embed(weight) + right[..., later, later])
            wanted = size[..., None] * right[..., i, later] - weight * left[..., i, later]
            x = torch.linalg.solve(system, wanted[..., None])
            for columns in (upper, left):
                columns[..., later] += columns[..., i : i + 1] @ x.mT
            left[..., later, :] += x @ left[..., i : i + 1, :]
            for rows in (inverse, right):
                rows[..., i : i + 1, :] -= x.mT @ rows[..., later, :]
            right[..., i : i + 1] -= right[..., later] @ x
        before, cost = cost, _diagonal_cost(left, right)
        if cost > (1 - _ENOUGH) * before:
            break
    variance = left.diagonal(dim1=-2, dim2=-1)
    scale = (variance.mean(-1, keepdim=True) / variance).sqrt()
    return upper * scale[..., None, :], inverse / scale[..., :, None]


def _diagonal_cost(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.diagonal(dim1=-2, dim2=-1) * right.diagonal(dim1=-2, dim2=-1)).sum())
