# SPDX-License-Identifier: Apache-2.0
"""Latents made even within triangular order: the same keys, and less lost to an 8-bit cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eigen.calibration.export.even import even_out, even_triangle
from vllm_eigen.calibration.methods.basis import LayerBases, orthogonal_basis
from vllm_eigen.calibration.methods.sensitivity import oblique_basis
from vllm_eigen.calibration.truncated import TruncatedModel
from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.kernels.rope import latent_order, triangular_order


def _cost(moment: torch.Tensor, upper: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    left, right = upper.mT @ moment @ upper, inverse @ moment @ inverse.mT
    return (left.diagonal(dim1=-2, dim2=-1) * right.diagonal(dim1=-2, dim2=-1)).sum(-1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rank=st.integers(1, 12), decades=st.floats(0, 4), seed=st.integers(0, 1000))
def test_the_triangle_is_even_and_no_change_of_an_element_costs_less(
    rank: int, decades: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, rank, rank, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(noise)[0]
    size = torch.logspace(0, -decades, rank, dtype=torch.float64)
    moment = rotation.mT @ (size[:, None] * rotation)
    upper, inverse = even_triangle(moment)
    unit = torch.eye(rank, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(upper @ inverse, unit)
    assert torch.equal(upper, upper.triu())
    assert torch.equal(inverse, inverse.triu())
    variance = (upper.mT @ moment @ upper).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(variance, variance.mean(-1, keepdim=True).expand_as(variance))
    found = _cost(moment, upper, inverse)
    assert bool((found <= _cost(moment, unit, unit) * (1 + 1e-9)).all())
    for row in range(rank):
        for column in range(row + 1, rank):
            for change in (-0.1, 0.1):
                added = unit.clone()
                added[:, row, column] = change
                other = _cost(moment, upper @ added, torch.linalg.inv(added) @ inverse)
                assert bool((other.sum() >= found.sum() * (1 - 2e-3)).all())


def _model(equalized: bool) -> tuple[TruncatedModel, torch.Tensor, torch.Tensor]:
    """One layer of two heads of 16, its keys and what sees them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rotation = torch.linalg.qr(normal(16, 16))[0]
    key = (normal(2, 4000, 16) * torch.logspace(1, -1, 16, dtype=torch.float64)) @ rotation
    seen = normal(2, 50, 16) * torch.logspace(0, -1, 16, dtype=torch.float64)
    moment = key.mT @ key / 4000
    basis = oblique_basis(moment, seen.mT @ seen) if equalized else orthogonal_basis(moment)
    ordered = type(basis)(**{**basis.tensors(), "order": latent_order(16, 16, 1)})
    model = cast(Any, SimpleNamespace())
    ranks = (LayerRanks(rank_k=11, rank_v=5),)
    return (
        TruncatedModel(model, (LayerBases(ordered, basis),), ranks, KeyMode.PRE_ROPE), key, seen
    )  # fmt: skip


@pytest.mark.parametrize("equalized", [False, True])
def test_keys_and_the_triangle_stay(equalized: bool) -> None:
    before, _, _ = _model(equalized)
    after = even_out(before)
    (old,), (new,) = (
        [item.at(rank) for item, rank in zip(model.bases, model.ranks, strict=True)]
        for model in (before, after)
    )
    torch.testing.assert_close(new.key[0] @ new.key[1], old.key[0] @ old.key[1])
    for found, expected in zip(new.value, old.value, strict=True):
        assert torch.equal(found, expected)
    order = latent_order(16, 16, 1)
    assert not new.key[1][..., order].tril(-1).any()
    assert torch.equal(new.key[0], old.key[0]) is not equalized


def test_rounding_to_fp8_costs_what_the_closed_form_says() -> None:
    before, key, seen = _model(equalized=True)

    def rounding(model: TruncatedModel) -> float:
        (item,), (rank,) = model.bases, model.ranks
        encoder, decoder = item.at(rank).key
        latent = key @ encoder
        scale = latent.abs().max() / 448
        stored = (latent / scale).to(torch.float8_e4m3fn).double() * scale
        return float(((stored - latent) @ decoder @ seen.mT).square().sum())

    layer, rank = before.bases[0], before.ranks[0].rank_k
    assert isinstance(layer, LayerBases)
    rotation, _ = triangular_order(layer.key.decoder[:, :rank], layer.key.order)
    moment = rotation.mT @ (layer.key.energy[:, :rank].sqrt()[..., None] * rotation)
    unit = torch.eye(rank, dtype=torch.float64).expand_as(moment)
    expected = _cost(moment, *even_triangle(moment)).sum() / _cost(moment, unit, unit).sum()
    assert expected < 0.92
    found = rounding(even_out(before)) / rounding(before)
    assert found == pytest.approx(float(expected), rel=0.05)
