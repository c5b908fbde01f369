# SPDX-License-Identifier: Apache-2.0
"""Reduced-rank regression: the low-rank heads whose sum comes nearest to a target.

    min  sum_tokens w | y - sum_h c_h E_h F_h |^2 + ridge * sum_h | W_h - E_h F_h |^2

over encoders E_h [d, r] and decoders F_h [r, n], from second moments alone. The decoders of all
heads together are least squares; one head's encoder and decoder, the others held, are the classic
reduced-rank regression (Izenman 1975), so sweeps over the heads never raise the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_TINY = 1e-12
"""Least eigenvalue of a head's moment relative to its largest."""
_FLOOR = 1e-8
"""Least energy of a decoder relative to the largest of its head, where latents are scaled by it."""


class Sums:
    """Weighted second moments of features and targets, float64, summed over tokens, and means.

    Attributes:
        tokens: summed over.
    """

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.gram, self.cross = zeros(features, features), zeros(features, targets)
        self.feature_mean, self.target_mean = zeros(features), zeros(targets)
        self.tokens = 0
        self._weight = 0.0

    def add(self, features: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """Add some tokens.

        Args:
            features, targets: [..., tokens, size]
            weights: of their squared errors, [..., tokens], positive.
        """
        x, y = (item.reshape(-1, item.shape[-1]).double() for item in (features, targets))
        weight = weights.reshape(-1, 1).double()
        weighted = x * weight
        self.gram.addmm_(weighted.mT, x)
        self.cross.addmm_(weighted.mT, y)
        self.tokens += len(x)
        self._weight += float(weight.sum())
        self.feature_mean += (weight * (x - self.feature_mean)).sum(0) / self._weight
        self.target_mean += (weight * (y - self.target_mean)).sum(0) / self._weight

    def centred(self) -> Sums:
        """Subtract the means; the bias carries them."""
        self.gram -= self._weight * torch.outer(self.feature_mean, self.feature_mean)
        self.cross -= self._weight * torch.outer(self.feature_mean, self.target_mean)
        return self


@dataclass(frozen=True)
class Regression:
    """Sums over tokens, float64.

    Attributes:
        gram: sum w c^T c, [num_heads, d, num_heads, d]
        cross: sum w c^T y, [num_heads, d, n]
    """

    gram: torch.Tensor
    cross: torch.Tensor

    def with_ridge(self, weights: torch.Tensor, ridge: float) -> Regression:
        """With the ridge term towards `weights` [num_heads, d, n], times the mean square of c."""
        heads, size = weights.shape[:2]
        flat = self.gram.reshape(heads * size, -1).clone()
        # A text on which nothing is attended to leaves the weights as they are.
        pull = ridge * float(flat.diagonal().mean()) or 1.0
        flat.diagonal().add_(pull)
        return Regression(flat.reshape(self.gram.shape), self.cross + pull * weights)

    def decoders(self, encoders: torch.Tensor) -> torch.Tensor:
        """Best F [num_heads, r, n] for E [num_heads, d, r]."""
        heads, _, rank = encoders.shape
        normal = torch.einsum("hir,hikj,kjs->hrks", encoders, self.gram, encoders)
        normal = normal.reshape(heads * rank, heads * rank)
        cross = (encoders.mT @ self.cross).flatten(0, 1)
        found = torch.linalg.solve(normal, cross)
        split: torch.Tensor = found.reshape(heads, rank, -1)
        return split

    def sweep(
        self, encoders: torch.Tensor, decoders: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fit every head's encoder, one after the other, then all decoders."""
        encoders = encoders.clone()
        maps = encoders @ decoders
        for head in range(len(encoders)):
            maps[head] = 0
            left = self.cross[head] - self.gram[head].flatten(1) @ maps.flatten(0, 1)
            encoders[head] = _leading(self.gram[head, :, head], left, encoders.shape[-1])
            # Their own best decoders: E^T G E is the identity.
            maps[head] = encoders[head] @ (encoders[head].mT @ left)
        return encoders, self.decoders(encoders)

    def equalized(self, encoders: torch.Tensor, decoders: torch.Tensor) -> torch.Tensor:
        """Encoders scaled so that rounding relative to a latent's size costs least.

        As in `methods.sensitivity`: latents of energy m whose decoders have energy w are best
        multiplied by (w / m)^{1/4} and equalized (`Basis.equalized`). Their total variance is that
        of what they encode.
        """
        own = torch.stack([self.gram[head, :, head] for head in range(len(encoders))])
        energy = ((own @ encoders) * encoders).sum(-2).clamp(min=_TINY)
        effect = decoders.square().sum(-1)
        largest = effect.amax(-1, keepdim=True).clamp(min=_TINY)
        scale = (effect.clamp(min=_FLOOR * largest) / energy) ** 0.25
        size = own.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        scale = scale * (size / (energy * scale**2).sum(-1, keepdim=True)).sqrt()
        return encoders * scale[:, None, :]


def _leading(gram: torch.Tensor, cross: torch.Tensor, rank: int) -> torch.Tensor:
    """E [d, rank] of one head: G^{-1/2} U with U the leading directions of G^{-1/2} cross."""
    energy, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    energy = energy.clamp(min=float(energy[-1]) * _TINY)
    inverse = (vectors / energy.sqrt()) @ vectors.mT
    aim = inverse @ cross
    found: torch.Tensor = inverse @ torch.linalg.eigh(aim @ aim.mT)[1].flip(-1)[:, :rank]
    return found
