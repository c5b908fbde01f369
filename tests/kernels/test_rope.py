# SPDX-License-Identifier: Apache-2.0
"""Latents in an order that lets fast pairs read few of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eigen.kernels.rope import (
    RotaryTable,
    even_frequencies,
    latent_order,
    pair_order,
    triangular_order,
)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    head_size=st.integers(1, 40),
    heads=st.integers(1, 4),
    rotary=st.floats(0, 1),
    share=st.floats(0, 1),
    lost=st.booleans(),
    neox=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_the_first_pairs_read_few_latents_and_keys_stay(
    head_size: int, heads: int, rotary: float, share: float, lost: bool, neox: bool, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    size, half = heads * head_size, int(rotary * head_size / 2)
    rank = max(1, round(share * size))
    basis = torch.randn(3, rank, size, generator=rng, dtype=torch.float64)
    if lost:
        basis[:, rank // 2 :] = 0.0
    order = latent_order(head_size, 2 * half, heads, neox)
    rotation, rotated = triangular_order(basis, order)

    latents = torch.randn(5, rank, generator=rng, dtype=torch.float64)
    np.testing.assert_allclose(latents @ rotation @ rotated, latents @ basis, atol=1e-12)
    unit = torch.eye(rank, dtype=torch.float64).expand(3, -1, -1)
    np.testing.assert_allclose(rotation.mT @ rotation, unit, atol=1e-12)
    dimension = torch.arange(size) % head_size
    for pair in range(half):
        first, second = (pair, pair + half) if neox else (2 * pair, 2 * pair + 1)
        in_pair = (dimension == first) | (dimension == second)
        assert not rotated[:, 2 * heads * (pair + 1) :, in_pair].any()


def test_every_dimension_has_its_place() -> None:
    assert latent_order(5, 4, 2).tolist() == [0, 2, 5, 7, 1, 3, 6, 8, 4, 9]
    assert pair_order(5, 4, is_neox_style=False).tolist() == [0, 1, 2, 3, 4, -1]


FREQUENCIES = torch.tensor([0.5, 0.01], dtype=torch.float64)


def table_of(angles: torch.Tensor) -> torch.Tensor:
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def test_frequencies_of_a_table() -> None:
    frequencies = 1e4 ** -(torch.arange(8).double() / 8)
    table = RotaryTable.from_frequencies(frequencies, 5000)
    assert table.frequencies == tuple(frequencies.tolist())
    assert (table.max_position, table.rotary_dim) == (5000, 16)
    # Tables of long contexts are scaled.
    np.testing.assert_allclose(even_frequencies(1.2 * table.cos_sin), frequencies, rtol=2e-7)
    single = (torch.arange(5000).float()[:, None] * frequencies.float()).double()
    found = even_frequencies(table_of(single))
    np.testing.assert_allclose(found, frequencies.float().double(), rtol=2e-8)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    frequency=st.floats(0, 3.1) | st.sampled_from([0.0, 1e-7]),
    begin=st.floats(-3, 3),
    positions=st.sampled_from([1, 2, 3, 100, 5000]),
)
def test_any_frequency_is_read_off_its_table(
    frequency: float, begin: float, positions: int
) -> None:
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequency + begin
    (found,) = even_frequencies(table_of(angles))
    assert found is not None
    # Over the whole table it is off by rounding alone.
    assert abs(found - frequency) * (positions - 1) <= 4e-7 * (1 + frequency * positions)


@pytest.mark.parametrize("changed", [0, 1])
def test_a_pair_of_two_regimes_has_no_frequency(changed: int) -> None:
    angles = torch.arange(700)[:, None] * FREQUENCIES
    angles[300:, changed] *= 1.01
    found = even_frequencies(table_of(angles))
    assert found[changed] is None
    assert found[1 - changed] == pytest.approx(float(FREQUENCIES[1 - changed]), rel=1e-6)


def test_a_rounded_table_has_no_frequencies() -> None:
    angles = torch.arange(700)[:, None] * FREQUENCIES
    assert even_frequencies(table_of(angles).bfloat16()) == (None, None)
    assert even_frequencies(torch.zeros(9, 4)) == (None, None)
