# SPDX-License-Identifier: Apache-2.0
"""Allocate one byte budget over the keys and values of all layers at the least measured loss.

Losses of different layers' keys and values are taken to add up, and one rank costs the same bytes
wherever it goes, so the best ranks for a budget come from an exact dynamic programme over the
loss curves that `probe` measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_eigen.calibration.allocation.probe import LayerCurves
from vllm_eigen.calibration.methods.basis import LayerBases
from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.common.errors import UsageError

Loss = NDArray[np.float64]
"""Loss of one layer's keys or values at every rank, [full_rank + 1]."""


def measured_losses(
    bases: Sequence[LayerBases], curves: Sequence[LayerCurves]
) -> list[tuple[Loss, Loss]]:
    """Losses of keys and values of every layer, as `probe` measured them."""
    return [
        (layer.key.at_every_rank(item.key), layer.value.at_every_rank(item.value))
        for item, layer in zip(bases, curves, strict=True)
    ]


def foretold_losses(bases: Sequence[LayerBases]) -> list[tuple[Loss, Loss]]:
    """The same as the bases foretell them."""
    return [(item.key.loss.numpy(), item.value.loss.numpy()) for item in bases]


def allocate_ranks(
    layers: Sequence[tuple[Loss, Loss]], kv_ratio: float, multiple: int = 1
) -> list[LayerRanks]:
    """Ranks of least total loss whose sum is `kv_ratio` of the full one, rounded to a multiple.

    Args:
        layers: losses of the keys and of the values of every layer.
        multiple: what each rank is a multiple of, unless it is full.

    Raises:
        UsageError: not even the least rank everywhere is so small.
    """
    losses = [loss for pair in layers for loss in pair]
    # What is chosen from are multiples, and the full rank.
    choices = [[*range(0, len(loss) - 1, multiple), len(loss) - 1] for loss in losses]
    steps = sum(len(some) - 1 for some in choices)
    budget = round(kv_ratio * steps)
    if budget < len(losses):
        others = " or --rank-multiple 1" if multiple > 1 else ""
        raise UsageError(
            f"--kv-ratio {kv_ratio:g} is below rank {multiple} in every layer; "
            f"ask for at least {len(losses) / steps:.3f}{others}"
        )
    chosen = select_ranks([loss[some] for loss, some in zip(losses, choices, strict=True)], budget)
    ranks = [some[index] for some, index in zip(choices, chosen, strict=True)]
    pairs = zip(ranks[::2], ranks[1::2], strict=True)
    return [LayerRanks(rank_k=key, rank_v=value) for key, value in pairs]


def select_ranks(losses: Sequence[Loss], budget: int) -> list[int]:
    """One rank from 1 to full for every curve, with sum `budget` and the least total loss.

    A budget past all full ranks gives those.
    """
    budget = min(budget, sum(len(loss) - 1 for loss in losses))
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    choices: list[NDArray[np.int32]] = []
    for loss in losses:
        total = np.full(budget + 1, np.inf)
        chosen = np.zeros(budget + 1, dtype=np.int32)
        for rank in range(1, min(len(loss) - 1, budget) + 1):
            candidate = best[: budget + 1 - rank] + loss[rank]
            better = candidate < total[rank:]
            total[rank:][better] = candidate[better]
            chosen[rank:][better] = rank
        best = total
        choices.append(chosen)
    ranks: list[int] = []
    left = budget
    for chosen in reversed(choices):
        ranks.append(int(chosen[left]))
        left -= ranks[-1]
    return ranks[::-1]
