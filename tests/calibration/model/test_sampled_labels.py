# SPDX-License-Identifier: Apache-2.0
"""Sampled labels against the cumulative distribution in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eigen.calibration.model.sampled_labels import sample


@settings(max_examples=50, deadline=None)
@given(
    size=st.sampled_from([1, 2, 3, 255, 256, 257, 512, 700]),
    sharp=st.sampled_from([0.1, 3.0, 200.0]),
    seed=st.integers(0, 99),
)
def test_samples_invert_the_cumulative_distribution(size: int, sharp: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = (sharp * torch.randn(64, size, generator=generator)).softmax(-1)
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    labels = sample(probs, uniform)
    chosen = probs.gather(1, labels[:, None]).squeeze(1)
    assert bool((chosen > 0).all())
    after = probs.double().cumsum(-1)
    after /= after[:, -1:]
    upper = after.gather(1, labels[:, None]).squeeze(1)
    assert bool((uniform <= upper + 1e-5).all())
    assert bool((uniform >= upper - chosen - 1e-5).all())
