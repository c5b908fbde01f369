# SPDX-License-Identifier: Apache-2.0
"""Two sides measured alternately and compared pair by pair: what slows a machine slows both."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def alternate(
    measure: Callable[[int], float], pairs: int, warm_up: int, tick: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """`measure(0)` and `measure(1)` alternately; every other pair starts with the other side.

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


def ratios(one: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    """other / one of each pair."""
    return tuple(b / a for a, b in zip(one, other, strict=True))
