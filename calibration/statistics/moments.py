# SPDX-License-Identifier: Apache-2.0
"""Second moments of queries, keys and values.

The KV heads are stacked, so that a joint moment holds every head's own (its diagonal blocks) and
every group's.
"""

from __future__ import annotations

import torch

from vllm_eigen.calibration.statistics.batch import Batch
from vllm_eigen.calibration.statistics.rotary import rotate
from vllm_eigen.calibration.statistics.statistic import Statistic
from vllm_eigen.checkpoint.families import Geometry


class KeyMoment(Statistic):
    """sum k^T k with the keys of all KV heads stacked."""

    name = "key"

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_kv_heads * head_size, same]."""
        return (geometry.num_kv_heads * geometry.head_size,) * 2

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        add_outer(total, batch.key)


class RotatedKeyMoment(Statistic):
    """The same after the rotary embedding, for key mode `post-rope`."""

    name = "rotated_key"
    rotated = True

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_kv_heads * head_size, same]."""
        return (geometry.num_kv_heads * geometry.head_size,) * 2

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        add_outer(total, rotate(batch.key, batch.rotation))


class QueryMoment(Statistic):
    """sum q^T q of every query head."""

    name = "query"

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_heads, head_size, head_size]."""
        return (geometry.num_heads, geometry.head_size, geometry.head_size)

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        add_per_head(total, batch.query)


class RotatedQueryMoment(Statistic):
    """The same after the rotary embedding, for key mode `post-rope`."""

    name = "rotated_query"
    rotated = True

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_heads, head_size, head_size]."""
        return (geometry.num_heads, geometry.head_size, geometry.head_size)

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        add_per_head(total, rotate(batch.query, batch.rotation))


class ValueMoment(Statistic):
    """sum v^T v with the values of all KV heads stacked."""

    name = "value"

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_kv_heads * head_size, same]."""
        return (geometry.num_kv_heads * geometry.head_size,) * 2

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        add_outer(total, batch.value)


def add_outer(total: torch.Tensor, x: torch.Tensor) -> None:
    """total += x^T x over tokens with heads stacked; x is [batch, length, heads, head_size]."""
    rows = x.flatten(2).flatten(0, 1).to(torch.float64)
    total.addmm_(rows.mT, rows)


def add_per_head(total: torch.Tensor, x: torch.Tensor) -> None:
    """total[h] += x_h^T x_h over tokens for every head; x is [batch, length, heads, head_size]."""
    rows = x.flatten(0, 1).transpose(0, 1).to(torch.float64)
    total.baddbmm_(rows.mT, rows)


def diagonal_blocks(moment: torch.Tensor, size: int) -> torch.Tensor:
    """Blocks [n, size, size] along the diagonal of a joint moment [n * size, n * size]."""
    count = moment.shape[0] // size
    return torch.stack(
        [moment[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)]
    )
