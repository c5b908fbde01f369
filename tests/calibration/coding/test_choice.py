# SPDX-License-Identifier: Apache-2.0
"""The choice of codes against every choice there is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_eigen.calibration.coding.choice import Choice, choose
from vllm_eigen.checkpoint.codes import Code

LOSSES = st.floats(1e-6, 1.0)


def part(sizes: Sequence[int], losses: Sequence[float]) -> list[Choice]:
    """Codes of 4 bytes a unit, the larger the better."""
    pairs = zip(sorted(sizes), sorted(losses, reverse=True), strict=True)
    return [Choice(Code(eight=4 * size), loss) for size, loss in pairs]


@st.composite
def parts(draw: st.DrawFn) -> list[list[Choice]]:
    found = []
    for _ in range(draw(st.integers(1, 4))):
        sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5, unique=True))
        losses = draw(st.lists(LOSSES, min_size=len(sizes), max_size=len(sizes), unique=True))
        found.append(part(sizes, losses))
    return found


@st.composite
def convex_parts(draw: st.DrawFn) -> list[list[Choice]]:
    """Each further unit gains less than the one before."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        gains = sorted(draw(st.lists(LOSSES, min_size=0, max_size=4)))
        losses = [1e-3, *itertools.accumulate(gains, initial=1e-3)][1:]
        found.append(part(range(1, len(losses) + 1), losses))
    return found


def cost(choices: Sequence[Choice]) -> int:
    return sum(item.code.num_bytes for item in choices)


def loss(choices: Sequence[Choice]) -> float:
    return sum(item.loss for item in choices)


def best(given_parts: list[list[Choice]], budget: float) -> float:
    """The least loss within the budget, by trying everything."""
    return min(loss(one) for one in itertools.product(*given_parts) if cost(one) <= budget)


def smallest(given_parts: list[list[Choice]]) -> int:
    return sum(min(item.code.num_bytes for item in one) for one in given_parts)


@given(parts(), st.integers(0, 120))
def test_within_the_budget_and_near_the_best(given_parts: list[list[Choice]], more: int) -> None:
    budget = smallest(given_parts) + more
    found = choose(given_parts, budget)
    assert cost(found) <= budget
    assert all(item in one for item, one in zip(found, given_parts, strict=True))
    # What cannot be spent is less than one step of one part on the hull.
    step = max(one[0].loss - one[-1].loss for one in given_parts)
    assert loss(found) <= best(given_parts, budget) + step + 1e-9


@given(convex_parts(), st.integers(0, 80))
def test_the_best_where_steps_are_equal_and_gain_less_and_less(
    given_parts: list[list[Choice]], more: int
) -> None:
    budget = smallest(given_parts) + more
    assert loss(choose(given_parts, budget)) == pytest.approx(best(given_parts, budget), abs=1e-9)


def test_what_is_left_of_the_budget_is_spent() -> None:
    """On the hull of one part only 4 and 40 bytes are; the code between gains, too."""
    one = part([1, 5, 10], [1.0, 0.9, 0.1])
    assert [item.code.eight for item in choose([one], 30)] == [20]


def test_the_smallest_where_the_budget_is_too_small() -> None:
    given_parts = [part([2, 3], [1.0, 0.5]), part([1, 9], [1.0, 0.1])]
    assert cost(choose(given_parts, 3)) == smallest(given_parts) == 12
