# SPDX-License-Identifier: Apache-2.0
"""Second moments of rotated vectors over all positions a window may begin at.

Attention depends on distances alone, so a window that begins s tokens later has the same keys,
queries and gradients, each rotated on by R(s). The bases of rotated keys (post-rope) must serve
every s, and a calibration window begins at 0. The mean of R(s) M R(s)^T over the shifts has a
closed form in a moment M, so that no shift is drawn and no token seen twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Shifts:
    """Shifts 0, 1, .., `last` in tokens, equally likely.

    frequencies: float64 [rotary_size / 2], radians a token of each RoPE pair.
    interleaved: whether pairs are (2 i, 2 i + 1), and not (i, i + rotary_size / 2).
    """

    frequencies: torch.Tensor
    last: int
    interleaved: bool = False

    def mean(self, moment: torch.Tensor, head_size: int) -> torch.Tensor:
        """The mean of R(s) M R(s)^T over the shifts.

        Args:
            moment: M of rotated vectors, float64 on the CPU, [.., n * head_size, n * head_size].
        """
        angles = torch.zeros(head_size, dtype=torch.float64)
        angles[: 2 * len(self.frequencies)] = self._joined(self.frequencies, self.frequencies)
        cos_cos, sin_cos, sin_sin = (item[:, None] for item in self._products(angles))
        # [.., n, head_size, n, head_size]: every pair of heads is rotated alike.
        blocks = moment.unflatten(-1, (-1, head_size)).unflatten(-3, (-1, head_size))
        # R(s) = cos + sin J with J (x, y) = (-y, x) for every pair, and 0 for what does not rotate.
        left = self._turn(blocks, -3)
        result: torch.Tensor = cos_cos * blocks + sin_sin * self._turn(left, -1) + sin_cos * left
        result += sin_cos.transpose(-3, -1) * self._turn(blocks, -1)
        return result.reshape(moment.shape)

    def _turn(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """J along a dimension of head_size elements."""
        size = 2 * len(self.frequencies)
        rotary, other = x.movedim(dim, -1).split([size, x.shape[dim] - size], dim=-1)
        if self.interleaved:
            first, second = rotary.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            first, second = rotary.chunk(2, dim=-1)
        turned = torch.cat([self._joined(-second, first), torch.zeros_like(other)], dim=-1)
        return turned.movedim(-1, dim)

    def _joined(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The dimensions of all pairs in their order, from the first and second one of each."""
        if self.interleaved:
            return torch.stack([first, second], dim=-1).flatten(-2)
        return torch.cat([first, second], dim=-1)

    def _products(self, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Means of cos a cos b, sin a cos b and sin a sin b, a and b being s * angles, [n, n]."""
        plus = self._mean_phase(angles[:, None] + angles)
        minus = self._mean_phase(angles[:, None] - angles)
        cos_cos, sin_sin = (minus.real + plus.real) / 2, (minus.real - plus.real) / 2
        return cos_cos, (plus.imag + minus.imag) / 2, sin_sin

    def _mean_phase(self, angles: torch.Tensor) -> torch.Tensor:
        """The mean of exp(i s angle) over the shifts: a geometric series."""
        count = self.last + 1
        half = angles / 2
        turns = half.sin().abs() < 1e-12  # all terms alike: angles are below one turn
        size = (count * half).sin() / torch.where(turns, 1.0, count * half.sin())
        return torch.polar(torch.ones_like(half), self.last * half) * torch.where(turns, 1.0, size)
