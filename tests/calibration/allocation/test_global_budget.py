# SPDX-License-Identifier: Apache-2.0
"""The allocator against brute force, and the loss curves it works on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eigen.calibration.allocation.global_budget import (
    allocate_ranks,
    measured_losses,
    select_ranks,
)
from vllm_eigen.calibration.allocation.probe import LayerCurves, LossCurve
from vllm_eigen.calibration.methods.basis import LayerBases, orthogonal_basis
from vllm_eigen.common.errors import UsageError

loss_curves = st.lists(
    st.lists(st.floats(0.01, 10), min_size=2, max_size=4).map(
        lambda values: np.array([*sorted(values, reverse=True), 0.0])
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(losses=loss_curves, data=st.data())
def test_selection_finds_the_best_ranks(losses: list[np.ndarray], data: st.DataObject) -> None:
    full = [len(loss) - 1 for loss in losses]
    budget = data.draw(st.integers(len(losses), sum(full)))
    ranks = select_ranks(losses, budget)
    assert sum(ranks) == budget
    assert all(1 <= rank <= most for rank, most in zip(ranks, full, strict=True))
    best = min(
        sum(loss[rank] for loss, rank in zip(losses, trial, strict=True))
        for trial in itertools.product(*(range(1, most + 1) for most in full))
        if sum(trial) == budget
    )
    found = sum(loss[rank] for loss, rank in zip(losses, ranks, strict=True))
    assert found == pytest.approx(best)


def _basis(size: int, seed: int) -> LayerBases:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 50, size, generator=generator, dtype=torch.float64)
    basis = orthogonal_basis(x.mT @ x)
    return LayerBases(basis, basis)


def test_curve_passes_through_what_was_measured() -> None:
    basis = _basis(8, 0).key
    curve = LossCurve((2, 4, 6), (0.5, 0.1, 0.01))
    losses = curve.at_every_rank(basis)
    assert losses[[2, 4, 6]] == pytest.approx([0.5, 0.1, 0.01])
    assert losses[8] == 0
    assert (np.diff(losses) <= 0).all()


@pytest.mark.parametrize("kv_ratio", [0.13, 0.5, 0.61, 0.99])
def test_the_ratio_is_met_to_a_rank(kv_ratio: float) -> None:
    bases = [_basis(16, seed) for seed in range(4)]
    curves = [
        LayerCurves(LossCurve((4, 8, 12), (1.0, 0.1 / n, 0.01)), LossCurve((8,), (0.3,)))
        for n in range(1, 5)
    ]
    ranks = allocate_ranks(measured_losses(bases, curves), kv_ratio)
    kept = sum(layer.rank_k + layer.rank_v for layer in ranks) / (4 * 2 * 16)
    assert abs(kept - kv_ratio) <= 0.5 / (4 * 2 * 16)
    with pytest.raises(UsageError, match="at least"):
        allocate_ranks(measured_losses(bases, curves), 0.01)
