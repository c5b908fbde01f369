# SPDX-License-Identifier: Apache-2.0
"""`--method released`: what the authors' code does for rotary models, a second reference row.

The code published with Eigen Attention differs from the paper for Llama: the key basis comes from
keys alone, without queries, and one basis serves all heads of a layer. Values and the thresholds
are as published. Without a rotary embedding it is the paper's method.
"""

from __future__ import annotations

from vllm_eigen.calibration.methods.base import Layer
from vllm_eigen.calibration.methods.basis import LayerBases, orthogonal_basis
from vllm_eigen.calibration.methods.paper import Paper
from vllm_eigen.calibration.statistics.moments import (
    KeyMoment,
    RotatedKeyMoment,
    ValueMoment,
    diagonal_blocks,
)
from vllm_eigen.calibration.statistics.statistic import Statistic
from vllm_eigen.checkpoint.modes import KeyMode


class Released(Paper):
    """One key basis for all heads of a layer, from keys alone; values per head; Algorithm 1."""

    name = "released"
    summary = "keys alone, one basis for all heads of a layer (Eigen Attention as released)"

    def statistics(self, key_mode: KeyMode, head_group: int = 1) -> tuple[Statistic, ...]:
        """Moments of keys where they are compressed, and of values."""
        if not key_mode.has_rope:
            return super().statistics(key_mode, head_group)
        key = RotatedKeyMoment() if key_mode.caches_rotated_keys else KeyMoment()
        return (key, ValueMoment())

    def bases(self, layer: Layer) -> LayerBases:
        """Singular directions of the keys of all heads together, and of each head's values."""
        if not layer.key_mode.has_rope:
            return super().bases(layer)
        size = layer.geometry.head_size
        statistic = RotatedKeyMoment if layer.key_mode.caches_rotated_keys else KeyMoment
        heads = diagonal_blocks(layer.moments.mean(statistic), size)
        shared = heads.mean(0, keepdim=True).expand_as(heads)
        value = diagonal_blocks(layer.moments.mean(ValueMoment), size)
        return LayerBases(orthogonal_basis(shared), orthogonal_basis(value))
