# SPDX-License-Identifier: Apache-2.0
"""Ranks per layer for a target: a KV ratio, an error budget or a file.

Between the pass over the layers and the refit. A ratio is met by the method's own rule: the
paper's thresholds (`algorithm1`), or one byte budget allocated by measured loss (`probe`,
`global_budget`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm_eigen.calibration.allocation.algorithm1 import (
    ErrorFunction,
    algorithm_1,
    budget_for_ratio,
    error_grid,
    ranks_at,
)
from vllm_eigen.calibration.allocation.global_budget import (
    allocate_ranks,
    foretold_losses,
    measured_losses,
)
from vllm_eigen.calibration.allocation.probe import LayerCurves
from vllm_eigen.calibration.allocation.rank_file import read_ranks
from vllm_eigen.calibration.layer_result import ErrorCurve, LayerResult
from vllm_eigen.calibration.methods.base import RankRule
from vllm_eigen.calibration.target import Target
from vllm_eigen.checkpoint.config import LayerRanks

CurveRule = Callable[[ErrorFunction], ErrorCurve]
"""Samples a layer's error as a function of the threshold."""


@dataclass(frozen=True)
class Thresholds:
    """What Algorithm 1 found.

    Attributes:
        budget: the error budget.
        thresholds, errors: of each layer, the errors interpolated.
    """

    budget: float
    thresholds: tuple[float, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Allocation:
    """Ranks, and how they were chosen.

    Attributes:
        ranks: one pair per layer.
        rule: `full`, `file` or a `RankRule`.
        thresholds: of Algorithm 1; None for other rules.
        loss_curves: of the global rule; None for other rules.
    """

    ranks: tuple[LayerRanks, ...]
    rule: str
    thresholds: Thresholds | None = None
    loss_curves: tuple[LayerCurves, ...] | None = None

    def record(self) -> dict[str, Any]:
        """For the provenance, JSON-ready; without the loss curves."""
        found: dict[str, Any] = {"rank_rule": str(self.rule)}
        if self.thresholds is not None:
            found["error_budget"] = self.thresholds.budget
            found["thresholds"] = [round(level, 6) for level in self.thresholds.thresholds]
            found["layer_errors"] = [round(error, 6) for error in self.thresholds.errors]
        return found


def curve_rule(target: Target, rule: RankRule) -> CurveRule | None:
    """Which points of a layer's error `allocate` reads; None for none."""
    if target.error_budget is not None:
        return partial(algorithm_1, budget=target.error_budget)
    if target.kv_ratio is not None and not target.full_rank and rule.uses_layer_errors:
        return error_grid
    return None


def allocate(
    target: Target,
    rule: RankRule,
    layers: Sequence[LayerResult],
    loss_curves: Callable[[], Sequence[LayerCurves]],
) -> Allocation:
    """Ranks of a target.

    Args:
        rule: how a ratio below 1 is met.
        layers: bases, and error curves sampled by `curve_rule` of this target.
        loss_curves: measures the loss curves; called if the rule needs them.

    Raises:
        UsageError: the ratio is out of the model's reach.
        InputError: the rank file cannot be used.
    """
    bases = [layer.bases for layer in layers]
    if target.rank_file is not None:
        return Allocation(tuple(read_ranks(target.rank_file, bases)), "file")
    if target.full_rank:
        return Allocation(tuple(ranks_at(item, 1.0) for item in bases), "full")
    smallest = min(basis.full_rank for item in bases for basis in (item.key, item.value))
    multiple = target.multiple_for(smallest)
    if target.kv_ratio is not None and rule is RankRule.FORETOLD:
        ranks = allocate_ranks(foretold_losses(bases), target.kv_ratio, multiple)
        return Allocation(tuple(ranks), rule)
    if target.kv_ratio is not None and rule.measures_losses:
        curves = tuple(loss_curves())
        ranks = allocate_ranks(measured_losses(bases, curves), target.kv_ratio, multiple)
        return Allocation(tuple(ranks), rule, loss_curves=curves)
    errors = [layer.errors for layer in layers if layer.errors is not None]
    if target.kv_ratio is not None:
        budget, thresholds = budget_for_ratio(bases, errors, target.kv_ratio, multiple)
    else:
        budget = target.error_budget or 0.0
        thresholds = [curve.thresholds[-1] for curve in errors]
    pairs = list(zip(errors, thresholds, strict=True))
    return Allocation(
        tuple(
            ranks_at(item, level, multiple) for item, level in zip(bases, thresholds, strict=True)
        ),
        RankRule.ALGORITHM_1,
        Thresholds(budget, tuple(thresholds), tuple(curve.error_at(x) for curve, x in pairs)),
    )
