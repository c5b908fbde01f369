# SPDX-License-Identifier: Apache-2.0
"""`--method paper`: the published algorithm, the reference row in every report.

Eigen Attention (arXiv 2408.05646, section 3.1): per KV head the SVD of keys and queries stacked
gives the key basis, the SVD of the values the value basis. With grouped queries all query heads
of a group are stacked on their key head.
"""

from __future__ import annotations

from vllm_eigen.calibration.methods.base import Layer, RankRule, StatisticsMethod
from vllm_eigen.calibration.methods.basis import LayerBases, orthogonal_basis
from vllm_eigen.calibration.statistics.moments import (
    KeyMoment,
    QueryMoment,
    RotatedKeyMoment,
    RotatedQueryMoment,
    ValueMoment,
    diagonal_blocks,
)
from vllm_eigen.calibration.statistics.statistic import Statistic
from vllm_eigen.checkpoint.modes import KeyMode


class Paper(StatisticsMethod):
    """Joint K-Q bases and value bases, one per KV head, ranks by Algorithm 1."""

    name = "paper"
    summary = "joint K-Q and value bases per head, Algorithm 1 (Eigen Attention as published)"
    rank_rule = RankRule.ALGORITHM_1

    def statistics(self, key_mode: KeyMode, head_group: int = 1) -> tuple[Statistic, ...]:
        """Moments of keys and queries where they are compressed, and of values."""
        if key_mode.caches_rotated_keys:
            return (RotatedKeyMoment(), RotatedQueryMoment(), ValueMoment())
        return (KeyMoment(), QueryMoment(), ValueMoment())

    def bases(self, layer: Layer) -> LayerBases:
        """Singular directions of [K; Q] and of V."""
        size = layer.geometry.head_size
        rotated = layer.key_mode.caches_rotated_keys
        key = layer.moments.mean(RotatedKeyMoment if rotated else KeyMoment)
        query = layer.moments.mean(RotatedQueryMoment if rotated else QueryMoment)
        joint = diagonal_blocks(key, size)
        joint = joint + query.reshape(joint.shape[0], -1, size, size).sum(1)
        value = diagonal_blocks(layer.moments.mean(ValueMoment), size)
        return LayerBases(orthogonal_basis(joint), orthogonal_basis(value))
