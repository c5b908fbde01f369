# SPDX-License-Identifier: Apache-2.0
"""How the latent of one head and token is coded in bits: the definition all rooms share.

A latent is a row of `rank` numbers, the most important first. The first `eight` of them are stored
in 8 bits, the next `four` in 4 and the last `two` in 2; a direction that gets no bits is not part
of the latent at all. Step sizes are multiplied into the bases at calibration: a latent comes in
steps, and no step is stored in the cache. A code of b bits is an unsigned integer that stands for
the middle of its step (a mid-rise quantizer, all 2^b levels of which are used):

    code = clamp(floor(x / s) + 2^(b - 1), 0, 2^b - 1),   x_hat = (code - h) s,   h = (2^b - 1) / 2

Without a token scale s = 1. With one

    s = max(scale_floor, max_i |x_i| / h_i), rounded up to bfloat16,

over the directions of 8 and 4 bits: those of 2 bits carry little and are clipped. It is stored
behind the codes of the token and head. Where s is 0, x / s is taken as 0.
"""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

WIDTHS = (8, 4, 2)
"""Bits of a direction, in the order in which a latent holds them."""

UNIT_BITS = 32
"""Codes of one width fill whole units of this size: what a kernel's lane loads."""

SCALE_BYTES = 2
"""A token scale is one bfloat16."""

FULL_BITS = 16
"""Bits of a number of the uncompressed cache."""


class Code(BaseModel):
    """Widths of one layer's keys or values; the same in all of its heads.

    Attributes:
        eight, four, two: directions coded in 8, 4 and 2 bits, multiples of 4, 8 and 16.
        token_scale: whether a scale follows the codes of each token and head.
        scale_floor: the smallest token scale. 1 leaves the steps of calibration alone unless a
            token exceeds their range (attention sinks); 0 lets every token choose its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    eight: int = Field(default=0, ge=0)
    four: int = Field(default=0, ge=0)
    two: int = Field(default=0, ge=0)
    token_scale: bool = False
    scale_floor: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for width, count in self.counts():
            if count * width % UNIT_BITS:
                raise ValueError(
                    f"{count} directions of {width} bits do not fill units of {UNIT_BITS} bits"
                )
        if self.rank == 0:
            raise ValueError("a code needs at least one direction")
        if self.token_scale and not self.eight + self.four:
            raise ValueError("a token scale is that of directions of 8 or 4 bits; there are none")
        return self

    def counts(self) -> tuple[tuple[int, int], ...]:
        """(width in bits, number of directions) in the order of the latent."""
        return tuple(zip(WIDTHS, (self.eight, self.four, self.two), strict=True))

    @property
    def rank(self) -> int:
        """Directions of the latent."""
        return self.eight + self.four + self.two

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one head and token."""
        return sum(width * count for width, count in self.counts()) // 8

    @property
    def num_bytes(self) -> int:
        """Bytes of one head and token in the cache, its scale included."""
        return self.code_bytes + (SCALE_BYTES if self.token_scale else 0)

    @property
    def bits(self) -> float:
        """Mean bits of a direction, those of the scale included."""
        return 8 * self.num_bytes / self.rank

    def __str__(self) -> str:
        """For tables: directions and their bits, such as `8x8 40x4 scale`."""
        parts = [f"{count}x{width}" for width, count in self.counts() if count]
        return " ".join([*parts, *(["scale"] if self.token_scale else [])])

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each direction, `rank` of them."""
        return tuple(width for width, count in self.counts() for _ in range(count))
