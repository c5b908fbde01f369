# SPDX-License-Identifier: Apache-2.0
"""Codes to choose from, and the choice that loses least for a number of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_eigen.checkpoint.codes import Code


@dataclass(frozen=True)
class Choice:
    """One way to code the keys, or the values, of a layer.

    Attributes:
        code: widths.
        loss: foretold KL divergence a token.
    """

    code: Code
    loss: float


def choose(parts: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """One choice of each part with the least total loss among those on the convex hull.

    A Lagrangian search: what is left of the budget is less than one step of one part, which is
    then spent on the part that gains most by it.

    Args:
        parts: keys and values of all layers, each with at least one choice.
        budget: bytes of one head and token over all parts; the smallest choices where it is less.
    """

    def at(price: float) -> list[Choice]:
        return [
            min(part, key=lambda item: item.loss + price * item.code.num_bytes) for part in parts
        ]

    def cost(choices: Sequence[Choice]) -> int:
        return sum(item.code.num_bytes for item in choices)

    low, high = 1e-16, 1e3
    if cost(at(low)) <= budget:
        return at(low)
    for _ in range(80):
        price = float(np.sqrt(low * high))
        low, high = (price, high) if cost(at(price)) > budget else (low, price)
    found = at(high)
    while True:
        left = budget - cost(found)
        best: tuple[float, int, Choice] | None = None
        for index, (part, now) in enumerate(zip(parts, found, strict=True)):
            for item in part:
                more = item.code.num_bytes - now.code.num_bytes
                gain = now.loss - item.loss
                if gain > 0 and 0 < more <= left and (best is None or gain / more > best[0]):
                    best = gain / more, index, item
        if best is None:
            return found
        found[best[1]] = best[2]
