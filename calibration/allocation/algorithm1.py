# SPDX-License-Identifier: Apache-2.0
"""Ranks by the paper's Algorithm 1, and its inverse: the error budget that gives a KV ratio.

A threshold on the normalised cumulative singular values gives each layer its ranks, the maximum
over its heads. Algorithm 1 (arXiv 2408.05646, section 3.3) lowers it step by step until the
relative error of the decoder layer's output passes the budget, then steps back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_eigen.calibration.layer_result import ErrorCurve
from vllm_eigen.calibration.methods.basis import Basis, LayerBases
from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.common.errors import UsageError

STEP = 0.02
GRID = (1.0, *(round(1 - STEP * n, 2) for n in (1, 2, 4, 6, 9, 12, 16, 20, 25, 30, 35, 40, 45)))
"""Thresholds at which the inverse measures the error; between them it interpolates."""


ErrorFunction = Callable[[float], float]
"""A layer's relative output error at a threshold."""


def rank_at(basis: Basis, threshold: float, multiple: int = 1) -> int:
    """Directions until the normalised cumulative singular values reach `threshold`.

    The maximum over the layer's heads, at least 1, up to the next `multiple` or the full rank;
    1.0 gives the full rank.
    """
    if threshold >= 1:
        return basis.full_rank
    singular = basis.energy.sqrt()
    total = singular.sum(-1, keepdim=True)
    share = singular.cumsum(-1) / total.clamp(min=1e-300)
    needed = (share < threshold).sum(-1) + 1
    needed[total[:, 0] <= 0] = 1
    return min(-(-int(needed.max()) // multiple) * multiple, basis.full_rank)


def ranks_at(bases: LayerBases, threshold: float, multiple: int = 1) -> LayerRanks:
    """Ranks of keys and values of a layer at one threshold, rounded up to a `multiple`."""
    key, value = (rank_at(basis, threshold, multiple) for basis in (bases.key, bases.value))
    return LayerRanks(rank_k=key, rank_v=value)


def algorithm_1(error_at: ErrorFunction, budget: float) -> ErrorCurve:
    """Thresholds 1, 0.98, ... down to the last whose error is within the budget."""
    thresholds, errors = [1.0], [0.0]
    for n in range(1, round(1 / STEP)):
        threshold = round(1 - STEP * n, 2)
        error = error_at(threshold)
        if error > budget:
            break
        thresholds.append(threshold)
        errors.append(error)
    return ErrorCurve(tuple(thresholds), tuple(errors))


def error_grid(error_at: ErrorFunction) -> ErrorCurve:
    """The error at all thresholds of `GRID`, for the inverse."""
    errors = [0.0, *(error_at(threshold) for threshold in GRID[1:])]
    return ErrorCurve(GRID, tuple(errors))


def budget_for_ratio(
    bases: Sequence[LayerBases],
    curves: Sequence[ErrorCurve],
    kv_ratio: float,
    multiple: int = 1,
) -> tuple[float, list[float]]:
    """The error budget whose ranks come closest to `kv_ratio`, and its threshold per layer.

    Raises:
        UsageError: the lowest threshold of `GRID` does not reach such a ratio.
    """
    if kv_ratio >= 1:
        return 0.0, [1.0] * len(bases)

    def thresholds(budget: float) -> list[float]:
        return [curve.threshold_at(budget) for curve in curves]

    def ratio(budget: float) -> float:
        return kv_ratio_of(
            [ranks_at(*pair, multiple) for pair in zip(bases, thresholds(budget), strict=True)],
            bases,
        )

    low, high = 0.0, max(max(curve.errors) for curve in curves) + 1e-9
    if ratio(high) > kv_ratio + 0.01:
        raise UsageError(
            f"--kv-ratio {kv_ratio:g} is below what this model's thresholds reach "
            f"({ratio(high):.2f}); ask for more"
        )
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if ratio(middle) <= kv_ratio else (middle, high)
    best = min((low, high), key=lambda budget: abs(ratio(budget) - kv_ratio))
    return best, thresholds(best)


def kv_ratio_of(ranks: Sequence[LayerRanks], bases: Sequence[LayerBases]) -> float:
    """KV ratio of some ranks."""
    kept = sum(layer.rank_k + layer.rank_v for layer in ranks)
    return kept / sum(item.key.full_rank + item.value.full_rank for item in bases)


def error_function(measure: Callable[[LayerRanks], float], bases: LayerBases) -> ErrorFunction:
    """Error as a function of the threshold, measured once per distinct pair of ranks."""
    known: dict[LayerRanks, float] = {}

    def error_at(threshold: float) -> float:
        ranks = ranks_at(bases, threshold)
        if ranks not in known:
            known[ranks] = measure(ranks)
        return known[ranks]

    return error_at
