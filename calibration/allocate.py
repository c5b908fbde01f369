"""Spend one byte budget over all layers, keys and values, where the measured loss is least.

The losses of single layers add up, to first order in the loss, so the best ranks for a budget
are those of equal marginal loss: the curves are made convex, and ranks are given out one at a
time to whoever gains most. One rank costs the same bytes wherever it goes, keys or values.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from calibration.methods.base import LayerBases
from calibration.probe import LayerCurves
from vllm_eigen.checkpoint import LayerRanks
from vllm_eigen.errors import UsageError


def allocate_ranks(
    bases: Sequence[LayerBases], curves: Sequence[LayerCurves], kv_ratio: float
) -> list[LayerRanks]:
    """Ranks whose sum is `kv_ratio` of the full one, rounded to a rank.

    Raises:
        UsageError: not even rank 1 everywhere is so small.
    """
    losses = [
        convex(curve.at_every_rank(basis))
        for item, layer in zip(bases, curves, strict=True)
        for curve, basis in ((layer.key, item.key), (layer.value, item.value))
    ]
    full = sum(len(loss) - 1 for loss in losses)
    budget = round(kv_ratio * full)
    if budget < len(losses):
        raise UsageError(
            f"--kv-ratio {kv_ratio:g} is below rank 1 in every layer; "
            f"ask for at least {len(losses) / full:.3f}"
        )
    ranks = spend(losses, budget)
    return [
        LayerRanks(rank_k=ranks[2 * n], rank_v=ranks[2 * n + 1]) for n in range(len(ranks) // 2)
    ]


def spend(losses: Sequence[np.ndarray], budget: int) -> list[int]:
    """Ranks of at least 1 with sum `budget` and the least total of convex loss curves."""
    ranks = [1] * len(losses)
    gains = [(loss[2] - loss[1], n) for n, loss in enumerate(losses) if len(loss) > 2]
    heapq.heapify(gains)
    for _ in range(min(budget, sum(len(loss) - 1 for loss in losses)) - len(losses)):
        _, n = heapq.heappop(gains)
        ranks[n] += 1
        if ranks[n] + 1 < len(losses[n]):
            heapq.heappush(gains, (losses[n][ranks[n] + 1] - losses[n][ranks[n]], n))
    return ranks


def convex(loss: np.ndarray) -> np.ndarray:
    """The greatest convex curve below `loss`, [n + 1] to [n + 1]: its lower hull."""
    hull: list[int] = []
    for n in range(len(loss)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (loss[b] - loss[a]) * (n - a) < (loss[n] - loss[a]) * (b - a):
                break
            hull.pop()
        hull.append(n)
    curve: np.ndarray = np.interp(np.arange(len(loss)), hull, loss[hull])
    return curve
