# SPDX-License-Identifier: Apache-2.0
"""A median and how far the measurements lie apart, and the error of a mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def two_errors(values: Sequence[float]) -> float:
    """Two standard errors of the mean; NaN for one value."""
    if len(values) < 2:
        return math.nan
    return 2 * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Spread:
    """Median, and below and above it either the quartiles or the extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def quartiles(cls, values: Sequence[float]) -> Spread:
        """Median and quartiles of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @classmethod
    def extremes(cls, values: Sequence[float]) -> Spread:
        """Median, smallest and largest of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str) -> str:
        """For a table: the median, and in parentheses the range where there is one."""
        low, high = form.format(self.low), form.format(self.high)
        middle = form.format(self.median)
        return middle if low == high else f"{middle} ({low} to {high})"
