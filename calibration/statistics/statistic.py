# SPDX-License-Identifier: Apache-2.0
"""Statistics: float64 sums over the tokens of one layer, from which a method makes its bases.

The pass over the layers (`calibration.layer_pass`) adds every captured `Batch` to an `Accumulator`;
a method reads the resulting `Moments`. Memory is independent of the number of tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_eigen.calibration.statistics.batch import Batch
from vllm_eigen.calibration.statistics.positions import Shifts
from vllm_eigen.checkpoint.families import Geometry


class Statistic(ABC):
    """A float64 sum over tokens; stateless, so that the sums alone are a resumable state.

    Attributes:
        name: of the sum in `Moments`.
        needs_probabilities: whether it reads `Batch.probs`, which costs the slower, eager
            attention.
        rotated: whether it sums products of vectors after the rotary embedding.
    """

    name: ClassVar[str]
    needs_probabilities: ClassVar[bool] = False
    rotated: ClassVar[bool] = False

    @abstractmethod
    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """Shape of the sum."""

    @abstractmethod
    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch to `total` (float64, on the batch's device) in place."""


@dataclass(frozen=True)
class Moments:
    """Sums of one layer over the calibration text.

    Attributes:
        tokens: tokens summed over.
        totals: float64 sums on the CPU by the statistic's name; divide by `tokens` for means.
    """

    tokens: int
    totals: Mapping[str, torch.Tensor]

    def mean(self, statistic: Statistic | type[Statistic]) -> torch.Tensor:
        """The statistic averaged over tokens, float64."""
        return self.totals[statistic.name] / self.tokens


class Accumulator:
    """Sums statistics for one layer; those of the same name once.

    Args:
        shifts: positions that windows may begin at besides 0, for sums of rotated vectors.
    """

    def __init__(
        self,
        statistics: Iterable[Statistic],
        geometry: Geometry,
        device: torch.device | str = "cpu",
        shifts: Shifts | None = None,
    ) -> None:
        self._head_size, self._shifts = geometry.head_size, shifts
        self._statistics = {item.name: item for item in statistics}
        self._totals = {
            name: torch.zeros(item.shape(geometry), dtype=torch.float64, device=device)
            for name, item in self._statistics.items()
        }
        self._tokens = 0

    def add(self, batch: Batch) -> None:
        """Add what a layer computed for a few windows."""
        for name, item in self._statistics.items():
            item.update(self._totals[name], batch)
        self._tokens += batch.tokens

    def moments(self) -> Moments:
        """The sums so far, on the CPU."""
        totals = {name: total.cpu().clone() for name, total in self._totals.items()}
        if self._shifts is not None:
            for name, item in self._statistics.items():
                if item.rotated:
                    totals[name] = self._shifts.mean(totals[name], self._head_size)
        return Moments(self._tokens, totals)
