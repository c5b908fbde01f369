"""Turn what was asked, a KV ratio, an error budget or explicit ranks, into ranks per layer.

Between the streaming pass and the writing. The ratio is met by the method's own rule: the
paper's thresholds (`ranks`), or one byte budget spent by measured loss (`probe`, `allocate`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calibration.allocate import allocate_ranks
from calibration.layers import CurveRule
from calibration.methods.base import LayerBases, RankRule
from calibration.options import Options
from calibration.probe import TOKENS, LayerCurves, LossCurve, probe, steps_of
from calibration.progress import Reporter
from calibration.ranks import ErrorCurve, algorithm_1, budget_for_ratio, ranks_at, sweep
from calibration.state import LayerResult, State
from calibration.stream import Skeleton
from vllm_eigen.checkpoint import LayerRanks
from vllm_eigen.errors import InputError
from vllm_eigen.families import KeyMode


def curve_rule(options: Options, rule: RankRule) -> CurveRule:
    """Which points of the layer error the streaming pass has to measure."""
    if options.error_budget is not None:
        return partial(algorithm_1, budget=options.error_budget)
    if options.kv_ratio is not None and options.kv_ratio < 1 and rule == "algorithm-1":
        return sweep
    return lambda error_at: ErrorCurve((1.0,), (0.0,))


def choose_ranks(
    options: Options,
    rule: RankRule,
    results: Sequence[LayerResult],
    skeleton: Skeleton,
    tokens: torch.Tensor,
    key_mode: KeyMode,
    state: State,
    reporter: Reporter,
) -> tuple[list[LayerRanks], dict[str, Any]]:
    """Ranks per layer, and how they were chosen, for the record.

    Args:
        tokens: the calibration windows, [num_windows, length]; a few serve to measure losses.

    Raises:
        UsageError: the ratio is out of the model's reach.
        InputError: the rank file cannot be used.
    """
    bases = [result.bases for result in results]
    if options.ranks is not None:
        ranks = read_ranks(options.ranks, bases)
        return ranks, {"rank_rule": "file"}
    if options.kv_ratio is not None and options.kv_ratio >= 1:
        return [ranks_at(item, 1.0) for item in bases], {"rank_rule": "full"}
    if options.kv_ratio is not None and rule == "global":
        curves = _loss_curves(bases, skeleton, tokens, key_mode, state, reporter)
        ranks = allocate_ranks(bases, curves, options.kv_ratio)
        return ranks, {"rank_rule": "global", "loss_curves": [asdict(item) for item in curves]}
    errors = [result.curve for result in results]
    if options.kv_ratio is not None:
        budget, thresholds = budget_for_ratio(bases, errors, options.kv_ratio)
    else:
        budget = options.error_budget or 0.0
        thresholds = [curve.thresholds[-1] for curve in errors]
    ranks = [ranks_at(item, level) for item, level in zip(bases, thresholds, strict=True)]
    return ranks, {
        "rank_rule": "algorithm-1",
        "error_budget": budget,
        "thresholds": [round(level, 6) for level in thresholds],
        "layer_errors": [
            round(curve.error_at(level), 6) for curve, level in zip(errors, thresholds, strict=True)
        ],
    }


def read_ranks(path: Path, bases: Sequence[LayerBases]) -> list[LayerRanks]:
    """Explicit ranks from a JSON file: a list of [rank_k, rank_v], first layer first.

    Raises:
        InputError: the file is missing or damaged, or does not fit the model.
    """
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
        ranks = [LayerRanks(rank_k=key, rank_v=value) for key, value in pairs]
    except OSError as error:
        raise InputError(f"rank file {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise InputError(
            f"rank file {path} is not a JSON list of [rank_k, rank_v] pairs of at least 1"
        ) from error
    if len(ranks) != len(bases):
        raise InputError(f"rank file {path} has {len(ranks)} layers, the model {len(bases)}")
    for index, (item, layer) in enumerate(zip(bases, ranks, strict=True)):
        if layer.rank_k > item.key.full_rank or layer.rank_v > item.value.full_rank:
            raise InputError(
                f"rank file {path}, layer {index}: ranks ({layer.rank_k}, {layer.rank_v}) exceed "
                f"the full {item.key.full_rank}"
            )
    return ranks


def _loss_curves(
    bases: Sequence[LayerBases],
    skeleton: Skeleton,
    tokens: torch.Tensor,
    key_mode: KeyMode,
    state: State,
    reporter: Reporter,
) -> list[LayerCurves]:
    stored = state.recall("loss-curves")
    if stored is not None:
        return [LayerCurves(**{part: _curve(item[part]) for part in item}) for item in stored]
    reporter.stage("probing", steps_of(bases))
    count = max(1, TOKENS // tokens.shape[1])
    curves = probe(skeleton, tokens[:count], bases, key_mode, reporter.step)
    state.remember("loss-curves", [asdict(item) for item in curves])
    return curves


def _curve(stored: dict[str, list[float]]) -> LossCurve:
    return LossCurve(tuple(int(rank) for rank in stored["ranks"]), tuple(stored["losses"]))
