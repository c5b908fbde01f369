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

    basis: int32 `[num_heads, 2 * pairs, units]`, four bytes a unit: low ones, then high ones. Or,
        where 8-bit codes meet 16-bit halves, LOW_STEPS * high + low, first those (numbers 0 and 2
        of every four, then 1 and 3), then the high bytes of the other codes.
    scale: float32 `[num_heads, 2 * pairs]`.
    offset: float32 `[num_heads, 2 * pairs]`, what a sum is too large by: stored codes are h above
        what they stand for (`checkpoint.codes`).
    """

    basis: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    low_units: int

    @classmethod
    def of(
        cls, basis: torch.Tensor, code: Code, in_bytes: bool = True, tile_units: int = 1
    ) -> IntegerRows:
        """Rounded to nearest, of `basis [num_heads, 2 * pairs, rank]`.

        Args:
            in_bytes: all are bytes; otherwise what meets 8-bit codes are halves.
            tile_units: with matrix units low and high bytes each fill whole tiles, with zeros, and
                two tiles may be read past the last row.
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
        if not in_bytes:
            h[: code.eight] -= 128  # from these the kernel takes so much before it multiplies
        offset = (high * h).sum(dim=2) + (low * h[: code.eight]).sum(dim=2) / LOW_STEPS
        if not in_bytes:
            halves = fine.unflatten(2, (-1, 2, 2)).permute(0, 1, 4, 2, 3).flatten(2)
            few_bits = high[..., code.eight :].to(torch.int8).contiguous()
            rows = torch.cat([halves.to(torch.int16).view(torch.int8), few_bits], dim=2)
            return cls(rows.view(torch.int32), scale, offset, code.eight // 4)
        parts = [
            functional.pad(part, (0, -part.shape[2] % (4 * tile_units))) for part in (low, high)
        ]
        rows = torch.cat(parts, dim=2).to(torch.int8)
        unused = 0 if tile_units == 1 else 2 * TILE_ROWS * rows.shape[2]
        padded = functional.pad(rows.flatten(), (0, unused))
        rows = padded[: rows.numel()].view(rows.shape)
        return cls(rows.view(torch.int32), scale, offset, parts[0].shape[2] // 4)
