"""Two sides measured by turns, and their ratio pair by pair: what slows a machine slows both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def by_turns(
    measure: Callable[[int], float], pairs: int, warm_up: int, tick: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """`measure(0)` and `measure(1)` alternately, the order turned from pair to pair.

    Args:
        measure: takes the side.
        pairs: counted.
        warm_up: pairs measured first and left out.
        tick: called after every measurement.
    """
    found: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs + warm_up):
        for side in (0, 1) if pair % 2 else (1, 0):
            found[side].append(measure(side))
            tick()
    return found[0][warm_up:], found[1][warm_up:]


@dataclass(frozen=True)
class Ratio:
    """other / one over at least two pairs: median and quartiles."""

    pairs: tuple[float, ...]
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, one: Sequence[float], other: Sequence[float]) -> Ratio:
        """Pair by pair."""
        pairs = tuple(b / a for a, b in zip(one, other, strict=True))
        low, median, high = statistics.quantiles(pairs, n=4, method="inclusive")
        return cls(pairs, median, low, high)
