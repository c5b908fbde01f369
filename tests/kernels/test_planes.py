"""Latents in an order that lets fast planes read few of them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eigen.kernels.planes import latent_order, plane_order, staircase


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    head_size=st.integers(1, 40),
    heads=st.integers(1, 4),
    rotary=st.floats(0, 1),
    share=st.floats(0, 1),
    lost=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_the_first_planes_read_few_latents_and_keys_stay(
    head_size: int, heads: int, rotary: float, share: float, lost: bool, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    size, half = heads * head_size, int(rotary * head_size / 2)
    rank = max(1, round(share * size))
    basis = torch.randn(3, rank, size, generator=rng, dtype=torch.float64)
    if lost:
        basis[:, rank // 2 :] = 0.0
    order = latent_order(head_size, 2 * half, heads)
    rotation, turned = staircase(basis, order)

    latents = torch.randn(5, rank, generator=rng, dtype=torch.float64)
    np.testing.assert_allclose(latents @ rotation @ turned, latents @ basis, atol=1e-12)
    unit = torch.eye(rank, dtype=torch.float64).expand(3, -1, -1)
    np.testing.assert_allclose(rotation.mT @ rotation, unit, atol=1e-12)
    dimension = torch.arange(size) % head_size
    for plane in range(half):
        in_plane = (dimension == plane) | (dimension == plane + half)
        assert not turned[:, 2 * heads * (plane + 1) :, in_plane].any()


def test_every_dimension_has_its_place() -> None:
    assert latent_order(5, 4, 2).tolist() == [0, 2, 5, 7, 1, 3, 6, 8, 4, 9]
    assert plane_order(5, 4, is_neox_style=False).tolist() == [0, 1, 2, 3, 4, -1]
