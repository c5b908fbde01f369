# SPDX-License-Identifier: Apache-2.0
"""Ranks that are multiples: every row of K and of V in the cache begins on 16 bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eigen.calibration.allocation.algorithm1 import GRID, budget_for_ratio, ranks_at
from vllm_eigen.calibration.allocation.allocate import allocate
from vllm_eigen.calibration.allocation.global_budget import allocate_ranks
from vllm_eigen.calibration.layer_result import ErrorCurve, LayerResult
from vllm_eigen.calibration.methods.base import RankRule
from vllm_eigen.calibration.methods.basis import LayerBases, orthogonal_basis
from vllm_eigen.calibration.target import Target
from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.common.errors import UsageError

ELEMENT_BYTES = {8: 2, 16: 1}
"""Of a cache whose ranks are rounded so."""


def _layer(size: int, seed: int) -> LayerResult:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3 * size, size, generator=generator, dtype=torch.float64)
    # Singular values that fall, so that thresholds have ranks to choose from.
    x *= torch.exp(-torch.arange(size, dtype=torch.float64) / (size / 6))
    basis = orthogonal_basis(x.mT @ x)
    curve = ErrorCurve(GRID, tuple(1.0 - level for level in GRID))
    return LayerResult(LayerBases(basis, basis), curve)


LAYERS = {size: [_layer(size, seed) for seed in range(3)] for size in (16, 64, 72)}


def _is_aligned(ranks: LayerRanks, multiple: int) -> bool:
    size = ELEMENT_BYTES[multiple]
    row = ranks.rank_k + ranks.rank_v
    return ranks.rank_k * size % 16 == 0 and row * size % 16 == 0


@settings(max_examples=40, deadline=None)
@given(
    falls=st.lists(st.floats(0.01, 2), min_size=2, max_size=10).filter(lambda x: len(x) % 2 == 0),
    multiple=st.sampled_from([8, 16]),
    ratio=st.floats(0.26, 1.0),
)
def test_rows_begin_on_16_bytes(falls: list[float], multiple: int, ratio: float) -> None:
    losses = [np.append(np.exp(-fall * np.arange(64)), 0.0) for fall in falls]
    ranks = allocate_ranks(list(zip(losses[::2], losses[1::2], strict=True)), ratio, multiple)
    assert all(_is_aligned(layer, multiple) for layer in ranks)
    kept = sum(layer.rank_k + layer.rank_v for layer in ranks)
    assert abs(kept - ratio * 64 * len(losses)) <= multiple / 2


def test_a_full_rank_need_not_be_a_multiple() -> None:
    loss = np.linspace(1, 0, 21)
    [ranks] = allocate_ranks([(loss, loss)], 1.0, 8)
    assert (ranks.rank_k, ranks.rank_v) == (20, 20)
    with pytest.raises(UsageError, match=r"at least 0.333 or --rank-multiple 1"):
        allocate_ranks([(loss, loss)], 0.1, 8)


@pytest.mark.parametrize("level", [0.3, 0.7, 0.9, 1.0])
def test_thresholds_are_rounded_up(level: float) -> None:
    for layer in LAYERS[64]:
        exact, rounded = ranks_at(layer.bases, level), ranks_at(layer.bases, level, 8)
        assert _is_aligned(rounded, 8)
        assert 0 <= rounded.rank_k - exact.rank_k < 8
        assert 0 <= rounded.rank_v - exact.rank_v < 8


def test_the_ratio_counts_rounded_ranks() -> None:
    bases = [layer.bases for layer in LAYERS[64]]
    curves = [layer.errors for layer in LAYERS[64] if layer.errors is not None]
    _, thresholds = budget_for_ratio(bases, curves, 0.6, 8)
    ranks = [ranks_at(*pair, 8) for pair in zip(bases, thresholds, strict=True)]
    kept = sum(layer.rank_k + layer.rank_v for layer in ranks) / (64 * 2 * len(bases))
    # All layers are alike here, and take a step of 8 of 64 together.
    assert abs(kept - 0.6) <= 8 / 64 / 2 + 0.01


@pytest.mark.parametrize("rule", [RankRule.FORETOLD, RankRule.ALGORITHM_1])
@pytest.mark.parametrize(
    ("size", "asked", "expected"),
    [(64, None, 8), (72, None, 8), (16, None, 1), (64, 16, 16), (64, 1, 1)],
)
def test_by_default_heads_of_64_and_more_are_aligned(
    rule: RankRule, size: int, asked: int | None, expected: int
) -> None:
    target = Target(0.6, rank_multiple=asked)
    assert target.multiple_for(size) == expected
    found = allocate(target, rule, LAYERS[size], lambda: []).ranks
    ranks = [rank for layer in found for rank in (layer.rank_k, layer.rank_v)]
    assert all(rank % expected == 0 for rank in ranks)
    if expected == 1:
        assert any(rank % 8 for rank in ranks)


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        Target(0.5, rank_multiple=0).check()
    with pytest.raises(UsageError, match="codes begin on 16 bytes"):
        Target(0.5, rank_multiple=8).ratio_of_coded()
