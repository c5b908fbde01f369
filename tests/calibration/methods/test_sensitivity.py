# SPDX-License-Identifier: Apache-2.0
"""The default method: its bases are the best there are, its metric is the attention's gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eigen.calibration.methods import get_method
from vllm_eigen.calibration.methods.base import Layer, RankMethod, RankRule
from vllm_eigen.calibration.methods.basis import METRIC_FLOOR, hartley
from vllm_eigen.calibration.methods.sensitivity import oblique_basis
from vllm_eigen.calibration.statistics import gradients
from vllm_eigen.calibration.statistics.attention_moments import GroupContext
from vllm_eigen.calibration.statistics.batch import Batch
from vllm_eigen.calibration.statistics.gradients import cotangent
from vllm_eigen.calibration.statistics.rotary import Rotation, rotate
from vllm_eigen.calibration.statistics.statistic import Accumulator
from vllm_eigen.checkpoint.families import Geometry
from vllm_eigen.checkpoint.modes import KeyMode


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Seven tokens are three tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "TILE", 3)
        yield


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 3),
    size=st.integers(1, 8),
    rows=st.integers(1, 20),
    scale=st.sampled_from([1e-8, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_oblique_bases_lose_what_the_best_low_rank_map_loses(
    heads: int, size: int, rows: int, scale: float, seed: int
) -> None:
    """Eckart and Young: no rank-r map P makes |K (1 - P) G^T| less than the tail of K G^T."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(heads, rows, size)) @ rng.normal(size=(heads, size, size))
    gradients = scale * rng.normal(size=(heads, size + 2, size))
    moment = torch.from_numpy(keys.transpose(0, 2, 1) @ keys)
    metric = torch.from_numpy(gradients.transpose(0, 2, 1) @ gradients)
    basis = oblique_basis(moment, metric)
    for head in range(heads):
        product = keys[head] @ gradients[head].T
        singular = np.zeros(size)
        values = np.linalg.svd(product, compute_uv=False)[:size]
        singular[: len(values)] = values
        for rank in range(size + 1):
            encoder, decoder = (part[head].numpy() for part in basis.at(rank))
            lost = keys[head] @ (np.eye(size) - encoder @ decoder) @ gradients[head].T
            best = (singular[rank:] ** 2).sum()
            slack = 10 * METRIC_FLOOR**0.5 * singular[0] ** 2
            assert (lost**2).sum() <= best + slack
            assert (lost**2).sum() >= best * (1 - 1e-6) - slack
        np.testing.assert_allclose(
            basis.energy[head].numpy(), singular**2, atol=1e-6 * (singular[0] ** 2 + 1e-300)
        )


def test_latents_have_one_variance_and_the_size_of_what_they_encode() -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 99, 8, generator=generator, dtype=torch.float64)
    key = key * torch.logspace(0, -3, 8, dtype=torch.float64)
    seen = 1e-7 * torch.randn(2, 50, 8, generator=generator, dtype=torch.float64)
    basis = oblique_basis(key.mT @ key / 99, seen.mT @ seen)
    for rank in range(2, 8):
        encoder, decoder = basis.at(rank)
        plain = basis.encoder[:, :, :rank] @ basis.decoder[:, :rank]
        torch.testing.assert_close(encoder @ decoder, plain)
        power = (key @ encoder).square().mean(1)
        assert bool((power <= 2.1 * power.mean(1, keepdim=True)).all())
        assert bool((power >= 0.02 * power.mean(1, keepdim=True)).all())
        ratio = power.mean(1) / key.square().mean((1, 2))
        assert bool(((ratio > 0.5) & (ratio < 50)).all())


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 40))
def test_hartley_is_its_own_inverse(rank: int) -> None:
    transform = hartley(rank)
    torch.testing.assert_close(transform @ transform, torch.eye(rank, dtype=torch.float64))


def test_rounding_to_fp8_costs_less_than_without_equalizing() -> None:
    """The closed form's claim: (tr L^{1/2})^2 / r instead of tr L."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 4000, 16, generator=generator, dtype=torch.float64)
    key = key * torch.logspace(1, -2, 16, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))
    key = key @ rotation
    seen = torch.randn(1, 50, 16, generator=generator, dtype=torch.float64)
    moment, metric = key.mT @ key / 4000, seen.mT @ seen
    basis = oblique_basis(moment, metric)

    def rounding(encoder: torch.Tensor, decoder: torch.Tensor) -> float:
        latent = key @ encoder
        error = (latent.to(torch.float8_e4m3fn).double() - latent) @ decoder @ seen.mT
        return float(error.square().sum())

    energy = basis.energy[0, :8]
    expected = energy.sqrt().sum() ** 2 / 8 / energy.sum()
    plain = rounding(basis.encoder[:, :, :8], basis.decoder[:, :8])
    found = rounding(*basis.at(8)) / plain
    assert expected < 0.6
    assert found == pytest.approx(float(expected), rel=0.4)


@pytest.mark.parametrize("kind", ["zero", "one token", "flat metric", "blind metric"])
def test_degenerate_sums_give_finite_exact_maps(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    seen = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    moment, metric = key.mT @ key, seen.mT @ seen
    if kind == "zero":
        moment, metric = torch.zeros_like(moment), torch.zeros_like(metric)
    elif kind == "one token":
        moment, metric = key[:1].mT @ key[:1], seen[:1].mT @ seen[:1]
    elif kind == "flat metric":
        metric = torch.zeros_like(metric)
    else:
        metric[:, 3:] = metric[3:, :] = 0
    basis = oblique_basis(moment[None], metric[None])
    for tensor in basis.tensors().values():
        assert bool(torch.isfinite(tensor).all())
    product = (basis.encoder.float() @ basis.decoder.float())[0]
    torch.testing.assert_close(product, torch.eye(6), atol=5e-2, rtol=0)
    encoder, decoder = basis.at(6)
    torch.testing.assert_close((encoder @ decoder)[0], torch.eye(6, dtype=torch.float64))
    if kind == "flat metric":
        energy, _ = torch.linalg.eigh(moment)
        torch.testing.assert_close(basis.energy[0], energy.flip(0).clamp(min=0))
    if kind == "blind metric":
        # Three directions are all that matter.
        assert float(basis.energy[0, 3:].sum()) < 1e-6 * float(basis.energy[0].sum())


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    o_proj: torch.Tensor,
    rotation: Rotation | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention of one window, written plainly: output, probabilities, context."""
    length, heads, size = query.shape
    shared = heads // key.shape[1]
    context, weights = [], []
    for head in range(heads):
        q = rotate(query[None], rotation)[0, :, head]
        k = rotate(key[None], rotation)[0, :, head // shared]
        scores = q @ k.mT / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        weights.append(scores.softmax(-1))
        context.append(weights[-1] @ value[:, head // shared])
    mixed = torch.stack(context, 1)
    return torch.einsum("thd,xhd->tx", mixed, o_proj), torch.stack(weights), mixed


def _batch(rotary: bool, seed: int = 0, length: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value = normal(length, 4, 6), normal(length, 2, 6), normal(length, 2, 6)
    o_proj = normal(10, 4, 6)
    rotation = None
    if rotary:
        angles = torch.arange(length)[None, :, None] * torch.tensor([1.0, 0.3, 0.05])
        rotation = Rotation(angles.double().cos(), angles.double().sin())
    _, weights, context = _attend(query, key, value, o_proj, rotation)
    return Batch(
        query[None], key[None], value[None], context[None], rotation, weights[None], o_proj
    )


@pytest.mark.parametrize("rotary", [False, True])
def test_gradients_are_those_of_automatic_differentiation(rotary: bool) -> None:
    batch = _batch(rotary)
    assert batch.o_proj is not None
    query = batch.query[0].clone().requires_grad_()
    key = batch.key[0].clone().requires_grad_()
    value = batch.value[0].clone().requires_grad_()
    output, _, _ = _attend(query, key, value, batch.o_proj, batch.rotation)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (1, 7, 10), generator=generator, dtype=torch.int8) * 2 - 1
    expected = torch.autograd.grad((output * signs[0]).sum(), [key, value, query])
    found = batch.gradients.key
    if rotary:
        found = rotate(found, batch.rotation, back=True)
        expected_query = rotate(expected[2][None], batch.rotation)[0]
    else:
        expected_query = expected[2]
    torch.testing.assert_close(batch.gradients.query[0], expected_query)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(batch.gradients.value[0], expected[1])
    torch.testing.assert_close(
        cotangent(batch)[0], torch.einsum("tx,xhd->thd", signs[0].double(), batch.o_proj)
    )


def test_the_metric_predicts_how_far_the_output_moves() -> None:
    """The mean of e S e^T over many windows is the mean squared movement for small errors e."""
    moved = predicted = 0.0
    for seed in range(60):
        batch = _batch(True, seed)
        assert batch.o_proj is not None
        gradient = batch.gradients.key
        gradient = rotate(gradient, batch.rotation, back=True).flatten(2)[0]
        error = 1e-4 * torch.randn(7, 2, 6, dtype=torch.float64)
        options = (batch.value[0], batch.o_proj, batch.rotation)
        exact, _, _ = _attend(batch.query[0], batch.key[0], *options)
        other, _, _ = _attend(batch.query[0], batch.key[0] + error, *options)
        moved += float((other - exact).square().sum())
        predicted += float((gradient * error.flatten(1)).sum(1).square().sum())
    assert predicted == pytest.approx(moved, rel=0.25)


def test_what_keys_have_in_common_does_not_matter() -> None:
    """A constant added to all keys moves no output, and is not what the query metric sees."""
    batch = _batch(False)
    moved = replace(batch, key=batch.key + 100 * torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(moved.gradients.query, batch.gradients.query)


@pytest.mark.parametrize("group", [1, 2])
def test_group_context_is_the_moment_of_attended_values(group: int) -> None:
    batch = _batch(False)
    assert batch.probs is not None
    accumulator = Accumulator([GroupContext(group)], Geometry(1, 4, 2, 6, 10))
    accumulator.add(batch)
    total = accumulator.moments().totals["group_context"]
    assert total.shape == (2 // group, 6 * group, 6 * group)
    values = batch.value[0].reshape(7, 2 // group, 6 * group)
    for latent in range(2 // group):
        heads = range(latent * 2 * group, (latent + 1) * 2 * group)
        rows = torch.cat([batch.probs[0, head] @ values[:, latent] for head in heads])
        torch.testing.assert_close(total[latent], rows.mT @ rows)
    if group == 1:
        rows = batch.context[0, :, :2].flatten(0, 1)
        torch.testing.assert_close(total[0], rows.mT @ rows)


@pytest.mark.parametrize("key_mode", list(KeyMode))
@pytest.mark.parametrize("group", [1, 2])
def test_latent_heads_are_as_wide_as_their_group(key_mode: Any, group: int) -> None:
    method = get_method("sensitivity")
    geometry = Geometry(1, 4, 2, 6, 10)
    accumulator = Accumulator(method.statistics(key_mode, group), geometry)
    for seed in range(20):
        accumulator.add(_batch(key_mode.has_rope, seed))
    layer = Layer(0, geometry, accumulator.moments(), key_mode, group)
    bases = method.bases(layer)
    for basis in (bases.key, bases.value):
        assert basis.full_rank == 6 * group
        assert basis.encoder.shape == (2 // group, 6 * group, 6 * group)
        assert bool((basis.energy.diff(dim=-1) <= 1e-9).all())
        assert basis.loss[0] == pytest.approx(1.0)


def test_ranks_come_from_one_budget() -> None:
    method = get_method("sensitivity")
    assert isinstance(method, RankMethod)
    assert method.rank_rule is RankRule.GLOBAL
