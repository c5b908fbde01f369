# SPDX-License-Identifier: Apache-2.0
"""`--method sensitivity`: bases that lose least of the attention output.

An error e in a cached key moves the attention output by about e S e^T, with S the Gauss-Newton
metric of `vllm_eigen.calibration.statistics.gradients`. With C the second moment of the keys, the
best rank-r map under that metric is oblique and closed-form:

    S^{1/2} C S^{1/2} = W L W^T,    E = S^{1/2} W_r,    D = W_r^T S^{-1/2}

whose loss is the sum of the eigenvalues left out. The paper's basis is S = 1 with queries added
to C; logit-optimal bases (KQ-SVD) are S = sum q^T q, which ignores softmax and positions.
Without rotation and with one KV head to a latent, C and S change places with sums that know what
keys have in common: S = sum q^T q and C the second moment of the output's gradients in q.
Values the same way, with C the second moment of the *attended* values and S theirs. Every latent
head, one KV head wide or several, has its own blocks of C and S.
"""

from __future__ import annotations

import torch

from vllm_eigen.calibration.methods.base import Layer, StatisticsMethod
from vllm_eigen.calibration.methods.basis import (
    Basis,
    LayerBases,
    metric_roots,
    symmetric,
    tail_loss,
)
from vllm_eigen.calibration.statistics.attention_moments import (
    GroupContext,
    KeySensitivity,
    QuerySensitivity,
    RotatedKeySensitivity,
    ValueSensitivity,
)
from vllm_eigen.calibration.statistics.moments import (
    KeyMoment,
    QueryMoment,
    RotatedKeyMoment,
    diagonal_blocks,
)
from vllm_eigen.calibration.statistics.statistic import Statistic
from vllm_eigen.checkpoint.modes import KeyMode

SCALE_FLOOR = 1e-8
"""Smallest energy of a direction relative to the largest, where latents are scaled by it."""


class Sensitivity(StatisticsMethod):
    """Oblique bases in the metric of the attention output; ranks by measured loss."""

    name = "sensitivity"
    summary = "oblique bases weighted by what keys and values do to the attention output"
    max_head_group = 8
    refit = True

    def statistics(self, key_mode: KeyMode, head_group: int = 1) -> tuple[Statistic, ...]:
        """Moments and metrics of keys where they are compressed, and of attended values."""
        key: tuple[Statistic, ...] = (KeyMoment(), KeySensitivity())
        if not key_mode.has_rope and head_group == 1:
            key = (KeyMoment(), QuerySensitivity(), QueryMoment())
        elif key_mode.caches_rotated_keys:
            key = (RotatedKeyMoment(), RotatedKeySensitivity())
        return (*key, GroupContext(head_group), ValueSensitivity())

    def bases(self, layer: Layer) -> LayerBases:
        """Least loss of the attention output for keys and for values."""
        size = layer.latent_size
        key, *metrics, context, value_metric = (
            layer.moments.mean(item) for item in self.statistics(layer.key_mode, layer.head_group)
        )
        cached = diagonal_blocks(key, size)
        if len(metrics) == 1:
            key_basis = oblique_basis(cached, diagonal_blocks(metrics[0], size))
        else:
            gradient, query = (
                item.reshape(layer.num_latent_heads, -1, size, size).sum(1) for item in metrics
            )
            key_basis = oblique_basis(gradient, query, cached)
        return LayerBases(key_basis, oblique_basis(context, diagonal_blocks(value_metric, size)))


def oblique_basis(
    moment: torch.Tensor, metric: torch.Tensor, cached: torch.Tensor | None = None
) -> Basis:
    """The nested maps that minimise tr (1 - ED)^T C (1 - ED) S at every rank.

    Latents are scaled for a quantized cache. Rounding that is relative to the size of a latent
    costs sum_j (A^T L A)_jj (A^-1 A^-T)_jj in the metric S when the latents are k' A. By Cauchy
    and Schwarz that is least, (tr L^{1/2})^2 / r, for A = L^{-1/4} and a rotation that gives all
    latents the same variance (`Basis.equalized`); unscaled it is tr L. Their total variance is that
    of the keys.

    Args:
        moment: C, symmetric positive semi-definite, [num_latent_heads, latent_size, latent_size].
        cached: second moment of what is encoded, where it is not C.
        metric: S, the same; its null space gets a weight of
            `METRIC_FLOOR`, and where it is zero, 1.
    """
    root, inverse = metric_roots(metric)
    energy, vectors = torch.linalg.eigh(symmetric(root @ moment @ root))
    energy, vectors = energy.flip(-1).clamp(min=0), vectors.flip(-1)
    encoder = root @ vectors
    held = moment if cached is None else cached
    latent = ((held @ encoder) * encoder).sum(-2)
    largest = latent.amax(-1, keepdim=True)
    spread = torch.where(largest > 0, (latent / largest).clamp(min=SCALE_FLOOR), 1.0) ** 0.25
    encoder = encoder / spread[..., None, :]
    # Latents as large as what they encode, on average over all directions.
    size = ((held @ encoder) * encoder).sum((-2, -1), keepdim=True)
    target = held.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    scale = torch.where((size > 0) & (target > 0), target / size, 1.0).sqrt()
    decoder = spread[..., :, None] * vectors.mT @ inverse
    return Basis(
        encoder * scale, decoder / scale, energy, tail_loss(energy), equalized=torch.tensor(True)
    )
