# SPDX-License-Identifier: Apache-2.0
"""Low-rank bases of a layer's keys and values: what a method returns and the rest truncates.

Rows are vectors, as in the paper: a token's key in one head is `k` in R^d, `k' = k E` is cached
and `k_hat = k' D` takes its place. `E = U, D = U^T` is the published, orthogonal case. A latent
head may serve `head_group` neighbouring KV heads, whose keys are then concatenated first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.kernels.rope import triangular_order

Maps = tuple[torch.Tensor, torch.Tensor]
"""Encoder [num_latent_heads, latent_size, rank], decoder [num_latent_heads, rank, latent_size]."""
METRIC_FLOOR = 1e-9
"""Smallest eigenvalue of a metric relative to its largest: what it ignores stays recoverable."""
METRIC_RIDGE = 1e-3
"""Added to the Fisher metric relative to its mean eigenvalue: what the text never asked for stays
recoverable."""


@dataclass(frozen=True)
class Basis:
    """Nested low-rank maps of all latent heads of a layer, most important direction first.

    Truncating to rank r keeps the first r columns of the encoder and rows of the decoder.
    At full rank `encoder @ decoder` is the identity.

    Attributes:
        encoder: [num_latent_heads, latent_size, latent_size], `k' = k E[:, :, :r]`
        decoder: [num_latent_heads, latent_size, latent_size], `k_hat = k' D[:, :r, :]`
        energy: squared singular value of each direction, descending, [num_latent_heads,
            latent_size]; the thresholds of Algorithm 1 apply to its square root.
        loss: predicted loss at rank r in any unit comparable between the layers and between K and
            V of this method, [latent_size + 1], non-increasing, `loss[latent_size] = 0`.
        equalized: scalar bool, whether truncated latents are rotated (Hartley) so that all have
            about the same variance, which suits a quantized cache. The product of encoder and
            decoder does not change.
        order: int64 [latent_size] or empty. If given, truncated latents are rotated by QR so that
            the decoder is triangular in it: element `order[j]` of a reconstructed key depends on
            the first j + 1 latents only (`vllm_eigen.kernels.rope`). The product does not change.
            It undoes what `equalized` asks for; `calibration.export.even` makes up for it.
    """

    encoder: torch.Tensor
    decoder: torch.Tensor
    energy: torch.Tensor
    loss: torch.Tensor
    equalized: torch.Tensor = field(default_factory=lambda: torch.tensor(False))
    order: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def full_rank(self) -> int:
        """Rank at which nothing is lost."""
        return int(self.encoder.shape[-1])

    def at(self, rank: int) -> Maps:
        """Encoder [num_latent_heads, latent_size, rank] and decoder [.., rank, latent_size].

        At full rank both are the identity, permuted by `order`: every basis spans the whole space
        then, and this one adds no rounding.
        """
        if rank == self.full_rank:
            unit = torch.eye(rank, dtype=self.encoder.dtype)
            unit = (unit[self.order] if len(self.order) else unit).expand_as(self.encoder)
            return unit.mT.contiguous(), unit.contiguous()
        encoder, decoder = self.encoder[:, :, :rank], self.decoder[:, :rank, :]
        if len(self.order):
            rotation, decoder = triangular_order(decoder, self.order)
            return encoder @ rotation, decoder
        if not self.equalized:
            return encoder, decoder
        rotation = hartley(rank).to(encoder)
        return encoder @ rotation, rotation @ decoder

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields by name, for storage between the stages of a calibration."""
        return {
            "encoder": self.encoder,
            "decoder": self.decoder,
            "energy": self.energy,
            "loss": self.loss,
            "equalized": self.equalized,
            "order": self.order,
        }


@dataclass(frozen=True)
class LayerMaps:
    """The maps of one layer at its ranks: k' = (k - o) E, k_hat = k' D + o, and so for values.

    Where the latents are coded, each direction's step is multiplied in (`checkpoint.codes`): E is
    divided by it, D multiplied, so that latents are rounded to integers.

    Attributes:
        key, value: encoder and decoder, directions in the order of the code.
        key_offset, value_offset: o, [num_kv_heads, head_size], or None for 0.
    """

    key: Maps
    value: Maps
    key_offset: torch.Tensor | None = None
    value_offset: torch.Tensor | None = None

    @property
    def latent_size(self) -> int:
        """Rank at which nothing is lost."""
        return int(self.key[0].shape[1])

    def at(self, ranks: LayerRanks) -> LayerMaps:
        """These maps; they have the ranks already.

        Raises:
            ValueError: they have others.
        """
        found = self.key[0].shape[2], self.value[0].shape[2]
        if found != (ranks.rank_k, ranks.rank_v):
            raise ValueError(f"maps of ranks {found} do not fit {(ranks.rank_k, ranks.rank_v)}")
        return self


@dataclass(frozen=True)
class LayerBases:
    """A method's bases for one layer."""

    key: Basis
    value: Basis

    @property
    def latent_size(self) -> int:
        """Rank at which nothing is lost."""
        return self.key.full_rank

    def at(self, ranks: LayerRanks) -> LayerMaps:
        """Maps of keys and values, truncated."""
        return LayerMaps(self.key.at(ranks.rank_k), self.value.at(ranks.rank_v))


def orthogonal_basis(moment: torch.Tensor) -> Basis:
    """Eigenvectors of second moments as a basis: the SVD of the stacked vectors, squared.

    Args:
        moment: symmetric positive semi-definite, [num_latent_heads, latent_size, latent_size].

    The loss is the energy left out, relative to the whole, summed over heads.
    """
    energy, vectors = torch.linalg.eigh(symmetric(moment))
    energy = energy.flip(-1).clamp(min=0)
    encoder = vectors.flip(-1)
    return Basis(encoder, encoder.mT.contiguous(), energy, tail_loss(energy))


def metric_roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S^{1/2} and S^{-1/2} of metrics [.., size, size]; of 1 where a metric is zero."""
    weights, vectors = torch.linalg.eigh(symmetric(metric))
    largest = weights[..., -1:]
    weights = torch.where(largest > 0, torch.maximum(weights, largest * METRIC_FLOOR), 1.0)
    root = weights.sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def weighted_moments(x: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moment of what a head caches, and the Fisher metric of errors in it.

    Args:
        x, gradient: float64 [num_tokens, size]; the gradient is that of the model's loss.

    Returns:
        C, the mean of x x^T weighted with |g|^2, and F, the mean of g g^T plus `METRIC_RIDGE`.
    """
    weights = gradient.square().sum(-1)
    moment = (x * weights[:, None]).T @ x / weights.sum().clamp(min=1e-300)
    metric = gradient.T @ gradient / len(gradient)
    mean = metric.diagonal().mean()
    return moment, metric + METRIC_RIDGE * mean * torch.eye(len(metric), dtype=metric.dtype)


def symmetric(x: torch.Tensor) -> torch.Tensor:
    """The symmetric part of [.., size, size]."""
    return (x + x.mT) / 2


def hartley(size: int) -> torch.Tensor:
    """The discrete Hartley transform, float64 [size, size]: symmetric, orthogonal, its own inverse.

    Every row has about the same weight in every direction.
    """
    index = torch.arange(size, dtype=torch.float64)
    angle = 2 * math.pi / max(1, size) * torch.outer(index, index)
    return (angle.cos() + angle.sin()) / math.sqrt(max(1, size))


def tail_loss(energy: torch.Tensor) -> torch.Tensor:
    """Share of the energy lost at each rank: [num_latent_heads, n] to [n + 1], from 1 down to 0."""
    per_rank = energy.sum(0)
    tail = per_rank.flip(0).cumsum(0).flip(0)
    whole = tail[0] if tail[0] > 0 else torch.ones((), dtype=energy.dtype)
    return torch.cat([tail / whole, torch.zeros(1, dtype=energy.dtype)])
