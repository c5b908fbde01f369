# SPDX-License-Identifier: Apache-2.0
"""The foretold loss: independent errors alone, coherent ones together."""

from __future__ import annotations

import pytest
import torch

from vllm_eigen.calibration.coding.loss import loss_by_direction, total_loss


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_independent_errors_cost_what_they_cost_alone() -> None:
    error, gradient = 0.3 * normal(4000, 8, 2), normal(4000, 8, 2, seed=1)
    gradient[..., 1] *= 2
    found = loss_by_direction(error, gradient)
    assert found.tolist() == pytest.approx([0.09 / 2, 4 * 0.09 / 2], rel=0.1)
    both = total_loss(error[:, :, None], gradient[:, :, None])
    assert both == pytest.approx(5 * 0.09 / 2, rel=0.1)


@pytest.mark.parametrize("length", [1, 5, 64])
def test_equal_errors_of_all_tokens_add_up(length: int) -> None:
    """Half of e^2 g^2 L^2 / 2 a window and half of L e^2 g^2 / 2, divided by L tokens."""
    error, gradient = torch.full((3, length, 1), 0.2), torch.full((3, length, 1), -0.7)
    expected = (0.2 * 0.7) ** 2 * (1 + length) / 4
    assert float(loss_by_direction(error, gradient)) == pytest.approx(expected, rel=1e-6)
    assert total_loss(error[:, :, None], gradient[:, :, None]) == pytest.approx(expected, rel=1e-6)


def test_the_total_is_that_of_tokens_and_heads_by_hand() -> None:
    error, gradient = normal(3, 4, 2, 5), normal(3, 4, 2, 5, seed=1)
    alone = together = 0.0
    for window in range(3):
        moved = 0.0
        for token in range(4):
            for head in range(2):
                one = float(error[window, token, head] @ gradient[window, token, head])
                alone, moved = alone + one**2, moved + one
        together += moved**2
    expected = (alone + together) / 2 / (2 * 3 * 4)
    assert total_loss(error, gradient) == pytest.approx(expected, rel=1e-9)


def test_errors_that_cancel_are_not_taken_for_free() -> None:
    error = torch.tensor([1.0, -1.0]).view(1, 2, 1)
    assert float(loss_by_direction(error, torch.ones(1, 2, 1))) == pytest.approx(2 / 4)
