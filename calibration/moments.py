"""The second moments that methods ask for, summed in float64 as the text streams by.

Memory is independent of the number of tokens. All KV heads are stacked, so that a joint moment
holds every head's own (its diagonal blocks) and every group's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from calibration.methods.base import Batch, Moments, Statistic
from vllm_eigen.families import Geometry


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

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_kv_heads * head_size, same]."""
        return (geometry.num_kv_heads * geometry.head_size,) * 2

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        add_outer(total, rotate(batch.key, batch.cos, batch.sin))


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

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_heads, head_size, head_size]."""
        return (geometry.num_heads, geometry.head_size, geometry.head_size)

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        add_per_head(total, rotate(batch.query, batch.cos, batch.sin))


class ValueMoment(Statistic):
    """sum v^T v with the values of all KV heads stacked."""

    name = "value"

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_kv_heads * head_size, same]."""
        return (geometry.num_kv_heads * geometry.head_size,) * 2

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        add_outer(total, batch.value)


class ContextMoment(Statistic):
    """sum c^T c of the attention output before the output projection, all query heads stacked."""

    name = "context"

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_heads * head_size, same]."""
        return (geometry.num_heads * geometry.head_size,) * 2

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        add_outer(total, batch.context)


class Accumulator:
    """Sums a method's statistics for one layer."""

    def __init__(
        self,
        statistics: Iterable[type[Statistic]],
        geometry: Geometry,
        device: torch.device | str = "cpu",
    ) -> None:
        self._statistics: Sequence[Statistic] = [kind() for kind in dict.fromkeys(statistics)]
        self._totals = {
            item.name: torch.zeros(item.shape(geometry), dtype=torch.float64, device=device)
            for item in self._statistics
        }
        self._tokens = 0

    def add(self, batch: Batch) -> None:
        """Add what a layer saw for a few windows."""
        for item in self._statistics:
            item.update(self._totals[item.name], batch)
        self._tokens += batch.tokens

    def moments(self) -> Moments:
        """The sums so far, on the CPU."""
        totals = {name: total.cpu().clone() for name, total in self._totals.items()}
        return Moments(self._tokens, totals)


def add_outer(total: torch.Tensor, x: torch.Tensor) -> None:
    """total += x^T x over tokens with heads stacked; x is [batch, length, heads, head_size]."""
    rows = x.flatten(2).flatten(0, 1).to(torch.float64)
    total.addmm_(rows.mT, rows)


def add_per_head(total: torch.Tensor, x: torch.Tensor) -> None:
    """total[h] += x_h^T x_h over tokens for every head; x is [batch, length, heads, head_size]."""
    rows = x.flatten(0, 1).transpose(0, 1).to(torch.float64)
    total.baddbmm_(rows.mT, rows)


def rotate(
    x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, *, back: bool = False
) -> torch.Tensor:
    """Rotary embedding of [batch, length, heads, head_size], or its inverse; no-op without tables.

    Half-split planes as in transformers' Llama; elements past the tables' width stay as they are.
    """
    if cos is None or sin is None:
        return x
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    half = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], dim=-1)
    # Tables may carry a scale (YaRN): its square is divided out of the inverse.
    result = turned * cos - half * sin if back else turned * cos + half * sin
    if back:
        result = result / (cos[..., :1] ** 2 + sin[..., :1] ** 2)
    return torch.cat([result, rest], dim=-1)


def diagonal_blocks(moment: torch.Tensor, size: int) -> torch.Tensor:
    """Blocks [n, size, size] along the diagonal of a joint moment [n * size, n * size]."""
    count = moment.shape[0] // size
    return torch.stack(
        [moment[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)]
    )
