# SPDX-License-Identifier: Apache-2.0
"""The size a calibration is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_eigen.checkpoint.codes import FULL_BITS
from vllm_eigen.common.errors import UsageError

ALIGNED = 8
"""Numbers of 16 bits in 16 bytes: with ranks that are multiples of it, every row of K and of V in
the cache begins on 16 bytes, and GPUs load it 16 bytes at once."""
SMALL = 64
"""Heads with fewer directions have too few multiples of ALIGNED to choose from."""


@dataclass(frozen=True)
class Target:
    """One of the first three is given.

    Attributes:
        kv_ratio: KV elements relative to the base model's, above 0 and at most 1.
        error_budget: relative error allowed at the output of each layer (the paper's Algorithm 1).
        rank_file: JSON list of [rank_k, rank_v] pairs, first layer first.
        rank_multiple: what ranks are multiples of, unless they are full or from a file; None for
            ALIGNED where heads have at least SMALL directions, and 1 elsewhere.
    """

    kv_ratio: float | None = None
    error_budget: float | None = None
    rank_file: Path | None = None
    rank_multiple: int | None = None

    @classmethod
    def of(
        cls,
        kv_ratio: float | None,
        kv_bits: float | None,
        error_budget: float | None,
        rank_file: Path | None,
        rank_multiple: int | None = None,
    ) -> Target:
        """From the options of a command line; bits are those of a cached number, scales included.

        Raises:
            UsageError: the bits are out of range.
        """
        if kv_bits is not None:
            if not 0 < kv_bits <= FULL_BITS:
                raise UsageError(
                    f"--kv-bits {kv_bits:g} is out of range; it lies above 0 and at most "
                    f"{FULL_BITS}"
                )
            kv_ratio = kv_bits / FULL_BITS
        return cls(kv_ratio, error_budget, rank_file, rank_multiple)

    def check(self) -> None:
        """Refuse what cannot be met by any model.

        Raises:
            UsageError: none or several are given, or one is out of range.
        """
        given = (self.kv_ratio, self.error_budget, self.rank_file)
        if sum(item is not None for item in given) != 1:
            raise UsageError(
                "pass one of --kv-ratio R (e.g. 0.27), --kv-bits B (e.g. 4.25), "
                "--error-budget E (e.g. 0.05), --ranks FILE"
            )
        if self.kv_ratio is not None and not 0 < self.kv_ratio <= 1:
            raise UsageError(
                f"--kv-ratio {self.kv_ratio:g} is out of range; it lies above 0 and at most 1"
            )
        if self.error_budget is not None and not 0 <= self.error_budget < 1:
            raise UsageError(
                f"--error-budget {self.error_budget:g} is out of range; it lies from 0 to below 1"
            )

        if self.rank_multiple is not None and self.rank_multiple < 1:
            raise UsageError(
                f"--rank-multiple {self.rank_multiple} is out of range; it is at least 1"
            )

    def multiple_for(self, full_rank: int) -> int:
        """What ranks of heads of so many directions are multiples of."""
        if self.rank_multiple is not None:
            return self.rank_multiple
        return ALIGNED if full_rank >= SMALL else 1

    def ratio_of_coded(self) -> float:
        """The KV ratio, all that coded latents can be asked for.

        Raises:
            UsageError: the target is another.
        """
        if self.rank_multiple is not None:
            raise UsageError(
                "--rank-multiple rounds 16-bit ranks; rows of codes begin on 16 bytes without it: "
                "drop it, or choose --method fisher, sensitivity or paper"
            )
        if self.kv_ratio is None:
            raise UsageError(
                "--method coded spends --kv-ratio R; for --error-budget and --ranks choose "
                "--method sensitivity or paper"
            )
        return self.kv_ratio

    @property
    def full_rank(self) -> bool:
        """Whether nothing is to be left out."""
        return self.kv_ratio is not None and self.kv_ratio >= 1
