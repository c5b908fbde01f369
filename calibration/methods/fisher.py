# SPDX-License-Identifier: Apache-2.0
"""`--method fisher`: 16-bit ranks by the loss of the model's output, from one backward pass.

With g the gradient of the model's loss in a cached key or value x, for labels drawn from the model
(`calibration.gradient_pass`), F the mean of g g^T and C the second moment of x weighted with the
|g|^2 of its token, bases are those of `sensitivity` with S = F:

    F^{1/2} C F^{1/2} = W L W^T,    E = F^{1/2} W_r,    D = W_r^T F^{-1/2}

The KL divergence of every rank is foretold by the same samples (`calibration.coding.loss`), so that
ranks of all layers follow from one budget without a trial: the cost is linear in the layers.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_eigen.calibration.methods.base import GradientMethod, RankRule
from vllm_eigen.calibration.methods.basis import Basis, LayerBases, weighted_moments
from vllm_eigen.calibration.methods.sensitivity import oblique_basis
from vllm_eigen.calibration.statistics.samples import CachedSamples


class Fisher(GradientMethod):
    """Oblique bases in the Fisher metric; ranks by foretold loss."""

    name = "fisher"
    summary = "oblique bases and ranks by the loss of the model's output, one backward pass"
    rank_rule = RankRule.FORETOLD
    refit = True

    def bases(self, samples: CachedSamples) -> LayerBases:
        """Least foretold loss for keys and for values."""
        return LayerBases(
            fisher_basis(samples.key, samples.key_gradient),
            fisher_basis(samples.value, samples.value_gradient),
        )


def fisher_basis(x: torch.Tensor, gradient: torch.Tensor) -> Basis:
    """The basis of what a layer caches.

    Args:
        x, gradient: float32 [num_windows, length, num_kv_heads, head_size].

    Returns:
        Its loss is the foretold KL divergence a token, in nats.
    """
    heads = [
        weighted_moments(*(item[:, :, head].flatten(0, 1).double() for item in (x, gradient)))
        for head in range(x.shape[2])
    ]
    moments, metrics = zip(*heads, strict=True)
    basis = oblique_basis(torch.stack(moments), torch.stack(metrics))
    return replace(basis, loss=foretold_losses(basis, x, gradient))


def foretold_losses(basis: Basis, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Foretold KL a token at every rank, all heads cut alike: float64 [latent_size + 1].

    `calibration.coding.loss.total_loss` of the directions that are left out.
    """
    windows, length = x.shape[:2]
    alone = torch.zeros(basis.full_rank + 1, dtype=torch.float64)
    together = torch.zeros_like(alone)
    for window in range(windows):
        latents = torch.einsum("thd,hdr->thr", x[window].double(), basis.encoder)
        slopes = torch.einsum("thd,hrd->thr", gradient[window].double(), basis.decoder)
        left_out = (latents * slopes).flip(-1).cumsum(-1).flip(-1)
        alone[:-1] += left_out.square().sum((0, 1))
        together[:-1] += left_out.sum((0, 1)).square()
    loss = (alone + together) / (4 * windows * length)
    # More directions never cost: what the samples say otherwise is their noise.
    return loss.flip(0).cummax(0).values.flip(0)
