# SPDX-License-Identifier: Apache-2.0
"""Codes of values: an orthogonal eigenbasis, mixed inside each width, one scale a token and head.

Attention averages rounding errors of values over tokens, which scales of their own keep small for
small values (those of attention sinks above all). The eigenvectors are those of the values as
directions, v / |v|, weighted with what a relative error in them costs, |v|^2 |g|^2: the few large
directions get 8 bits, so that they do not set the scale of the others. Inside a width directions
are mixed by a Hartley transform: all have about the same variance then, and one step fits them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_eigen.calibration.coding.choice import Choice
from vllm_eigen.calibration.coding.loss import total_loss
from vllm_eigen.calibration.methods.basis import Maps, hartley
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.common.errors import UsageError
from vllm_eigen.kernels.coding import decode, encode

STEP_FOUR = 0.335
"""Step of 4 bits, in standard deviations: the best for normal variables (Max 1960)."""
STEP_TWO = 0.996
"""The same of 2 bits."""
STEP_EIGHT = 0.1
"""Step of 8 bits relative to that of 4 bits, unless the largest direction asks for more."""
RANGE_EIGHT = 4.0
"""Standard deviations of the largest direction that 8 bits hold without raising the scale."""


@dataclass(frozen=True)
class ValueCodes:
    """What codes of one layer's values are made of.

    Attributes:
        vectors: float64 [num_kv_heads, head_size, head_size], columns are directions, the largest
            first.
        energy: mean square of each direction, float64 [num_kv_heads, head_size].
        choices: codes with their foretold loss, at growing size.
    """

    vectors: torch.Tensor
    energy: torch.Tensor
    choices: tuple[Choice, ...] = ()

    def maps(self, code: Code) -> Maps:
        """Encoder and decoder with relative steps multiplied in."""
        spread = self.energy.sqrt()
        eight, four = code.eight, code.eight + code.four
        blocks, steps = [], []
        unit = _spread(spread[:, eight:four]) * STEP_FOUR if code.four else None
        for width, first, last in ((8, 0, eight), (4, eight, four), (2, four, code.rank)):
            if first == last:
                continue
            block = self.vectors[:, :, first:last]
            if width < 8:
                block = block @ hartley(last - first)
            if width == 8:
                step = RANGE_EIGHT * spread[:, 0] / 127
                step = step if unit is None else torch.maximum(STEP_EIGHT * unit, step)
            else:
                factor = STEP_FOUR if width == 4 else STEP_TWO
                step = _spread(spread[:, first:last]) * factor
            blocks.append(block)
            steps.append(step[:, None].expand(-1, last - first))
        basis, step = torch.cat(blocks, -1), torch.cat(steps, -1).clamp(min=1e-12)
        return basis / step[:, None], basis.mT * step[:, :, None]


def fit_values(value: torch.Tensor, gradient: torch.Tensor) -> ValueCodes:
    """Codes for the values of a layer.

    Args:
        value, gradient: float32 [num_windows, length, num_kv_heads, head_size].

    Raises:
        UsageError: no code covers the head size.
    """
    rows, slopes = value.double().flatten(0, 1), gradient.double().flatten(0, 1)
    squares = rows.square().sum(-1).clamp(min=1e-24)
    weights = slopes.square().sum(-1) * squares
    weights = weights + 1e-6 * weights.mean(0) + 1e-300
    weights = weights / squares / weights.sum(0)
    moment = torch.einsum("th,thi,thj->hij", weights, rows, rows)
    energy, vectors = torch.linalg.eigh(moment)
    floor = 1e-6 * energy.mean(-1, keepdim=True).clamp(min=1e-30)
    fit = ValueCodes(vectors.flip(-1), torch.maximum(energy.flip(-1), floor))
    choices = [
        Choice(code, total_loss(_coded(value, fit.maps(code), code) - value, gradient))
        for code in codes_of(value.shape[-1])
    ]
    return ValueCodes(fit.vectors, fit.energy, tuple(choices))


def codes_of(head_size: int) -> list[Code]:
    """Codes that cover all directions, at growing size: what is dropped is lost in every token.

    Raises:
        UsageError: there is none.
    """
    found = [
        Code(eight=eight, four=four, two=two, token_scale=True)
        for eight, four, two in _counts(head_size)
    ]
    if not found:
        raise UsageError(
            f"values with a head size of {head_size} cannot be coded, which takes a multiple of 4; "
            "choose another --method"
        )
    return sorted(found, key=lambda code: code.num_bytes)


def _counts(size: int) -> Iterator[tuple[int, int, int]]:
    """Directions of 8, 4 and 2 bits."""
    if size % 4:
        return
    few = {0, 4 if size < 32 or size % 8 else 8, size // 16 * 4, size // 8 * 4, size}
    for eight in sorted(few):
        for two in range(0, size - eight + 1, 16 * max(1, size // 128)):
            four = size - eight - two
            if four % 8 == 0 and (four or eight == size):
                yield eight, four, two


def _coded(value: torch.Tensor, maps: Maps, code: Code) -> torch.Tensor:
    """What attention reads back."""
    encoder, decoder = (item.float() for item in maps)
    latents = torch.einsum("wthd,hdr->wthr", value, encoder)
    return torch.einsum("wthr,hrd->wthd", decode(*encode(latents, code), code), decoder)


def _spread(spread: torch.Tensor) -> torch.Tensor:
    """Root mean square of some directions, [num_kv_heads]."""
    return spread.square().mean(-1).sqrt()
