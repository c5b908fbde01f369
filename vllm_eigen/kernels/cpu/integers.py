# SPDX-License-Identifier: Apache-2.0
"""Key bases in integers, as `csrc/coded/reconstruct.h` multiplies them with codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from vllm_eigen.checkpoint.codes import Code

LARGEST = 127
LOW_STEPS = 128  # low bytes to a high one
TILE_ROWS = 16  # of an operand of a matrix unit


@dataclass(frozen=True, eq=False)
class IntegerRows:
    """Rows of a basis: (high + low / LOW_STEPS) * scale, low bytes for 8-bit codes alone.

    basis: int32 `[num_heads, 2 * pairs, units]`, four bytes a unit: low ones, then high ones.
    scale: float32 `[num_heads, 2 * pairs]`.
    offset: float32 `[num_heads, 2 * pairs]`, what a sum is too large by: stored codes are h above
        what they stand for (`checkpoint.codes`).
    """

    basis: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    low_units: int

    @classmethod
    def of(cls, basis: torch.Tensor, code: Code, tile_units: int = 1) -> IntegerRows:
        """Rounded to nearest, of `basis [num_heads, 2 * pairs, rank]`.

        With matrix units low and high bytes each fill whole tiles, with zeros, and two tiles may be
        read past the last row.
        """
        scale = (basis.abs().amax(dim=2) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        numbers = basis / scale[..., None]
        fine = (numbers[..., : code.eight] * LOW_STEPS).round()
        high = torch.cat(
            [((fine + LOW_STEPS // 2) / LOW_STEPS).floor(), numbers[..., code.eight :].round()],
            dim=2,
        )
        low = fine - LOW_STEPS * high[..., : code.eight]
        h = torch.tensor([(2**width - 1) / 2 for width in code.widths])
        offset = (high * h).sum(dim=2) + (low * h[: code.eight]).sum(dim=2) / LOW_STEPS
        parts = [
            functional.pad(part, (0, -part.shape[2] % (4 * tile_units))) for part in (low, high)
        ]
        rows = torch.cat(parts, dim=2).to(torch.int8)
        unused = 0 if tile_units == 1 else 2 * TILE_ROWS * rows.shape[2]
        padded = functional.pad(rows.flatten(), (0, unused))
        rows = padded[: rows.numel()].view(rows.shape)
        return cls(rows.view(torch.int32), scale, offset, parts[0].shape[2] // 4)
