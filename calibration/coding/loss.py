# SPDX-License-Identifier: Apache-2.0
"""What an error in the cache costs: the KL divergence of the model's output that it foretells.

An error e_t in the key or value of token t, with g_t the gradient of the window's loss in it for
labels drawn from the model, changes the distribution of the window by

    KL ~ E[(sum_t g_t . e_t)^2] / 2

(the Fisher metric). Rounding errors of different tokens are independent, so that the square of the
sum is the sum of the squares; the error of a direction that is dropped, or that falls into one
level, is the same in many tokens and adds up. The few windows of a calibration estimate the first
well and the second with much noise, so that the foretold loss is their mean.
"""

from __future__ import annotations

import torch


def loss_by_direction(error: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Foretold KL a token of each direction, taken alone.

    Args:
        error, gradient: [num_windows, length, size], in coordinates dual to each other.

    Returns:
        float64 [size].
    """
    product = (error * gradient).double()
    windows, length, _ = product.shape
    alone = product.square().sum((0, 1))
    together = product.sum(1).square().sum(0)
    result: torch.Tensor = torch.maximum(alone, (alone + together) / 2) / (2 * windows * length)
    return result


def total_loss(error: torch.Tensor, gradient: torch.Tensor) -> float:
    """Foretold KL a token of all heads' errors [num_windows, length, num_heads, size] together."""
    by_head = (error * gradient).double().sum(-1)
    windows, length, _ = by_head.shape
    alone = by_head.square().sum()
    together = by_head.sum((1, 2)).square().sum()
    return float((alone + together) / (4 * windows * length))
