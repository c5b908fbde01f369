# SPDX-License-Identifier: Apache-2.0
"""The keys and values that one layer caches, token by token, with the gradient of the loss in them.

Made by the gradient pass (`calibration.gradient_pass`), read by methods that weigh by the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_eigen.calibration.statistics.rotary import Rotation, rotate
from vllm_eigen.checkpoint.modes import KeyMode


@dataclass(frozen=True)
class LayerSamples:
    """What one layer caches, and the gradient of the loss in it.

    Keys are those before the rotary embedding, after the key norm where the family has one, i.e.
    what the low-rank map is applied to in key mode `pre-rope`; values are those that are cached.
    The loss is the sum of -log p(sampled label) over all tokens of a window.

    Attributes:
        key, value, key_gradient, value_gradient: float32 [num_windows, length, num_kv_heads,
            head_size] on the CPU.
        rotation: the rotary embedding at the windows' positions, on the CPU; None without it.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_gradient: torch.Tensor
    value_gradient: torch.Tensor
    rotation: Rotation | None


@dataclass(frozen=True)
class CachedSamples:
    """The same as the cache holds it: keys are rotated where the key mode caches rotated ones.

    Attributes:
        key, value, key_gradient, value_gradient: as in `LayerSamples`.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_gradient: torch.Tensor
    value_gradient: torch.Tensor


def cached_samples(
    samples: LayerSamples, key_mode: KeyMode, frequencies: torch.Tensor | None, positions: int
) -> CachedSamples:
    """Samples in a key mode.

    Rotated keys are those of tokens at any position, which bases and steps must serve. Attention
    depends on distances alone, so that a token's key and gradient may be rotated on together, and
    every token is by a shift of its own: one shift a window would give the second moments no more
    rotations than there are windows. The first token stays: the attention sink is at position 0.

    Args:
        frequencies: radians a token of each RoPE pair; None where they depend on the length, and
            tokens stay where they are.
        positions: that the rotary embedding is used for.
    """
    key, gradient = samples.key, samples.key_gradient
    if key_mode.caches_rotated_keys and samples.rotation is not None:
        rotations = [samples.rotation]
        if frequencies is not None:
            windows, length = key.shape[:2]
            generator = torch.Generator().manual_seed(0)
            last = max(1, positions - length)
            shifts = torch.randint(0, last, (windows, length, 1), generator=generator)
            shifts[:, 0] = 0
            angles = shifts * frequencies
            shift = Rotation(angles.cos(), angles.sin(), samples.rotation.interleaved)
            rotations.append(shift.to(key))
        for rotation in rotations:
            key, gradient = rotate(key, rotation), rotate(gradient, rotation)
    return CachedSamples(key, samples.value, gradient, samples.value_gradient)
