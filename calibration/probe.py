"""How much of the model's output is lost when one layer's keys or values alone are compressed.

For every layer, for its keys and for its values, a few ranks are tried on a few windows; what
counts is the Kullback-Leibler divergence of the final next-token distributions from the base
model's. All trials stream through the layers together, so that each layer is loaded once: trial
t of layer l joins at layer l and runs on uncompressed from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from calibration.methods.base import Basis, LayerBases
from calibration.metrics import Comparison
from calibration.stream import Skeleton, Stream, allocate
from calibration.taps import compress
from vllm_eigen.families import KeyMode

TOKENS = 2048
"""Tokens a trial runs on: whole windows, at least one."""
SHARES = (0.25, 0.5, 0.75)
"""Ranks tried, relative to the full rank."""
_FLOOR = 1e-12


@dataclass(frozen=True)
class LossCurve:
    """Loss of the model's output against the rank of one layer's keys or values.

    Attributes:
        ranks: tried, ascending, below the full rank.
        losses: measured KL a token in nats, positive, non-increasing.
    """

    ranks: tuple[int, ...]
    losses: tuple[float, ...]

    def at_every_rank(self, basis: Basis) -> np.ndarray:
        """Loss at ranks 0 to full, [full_rank + 1]: measured where tried, between and beyond
        following the method's own predicted loss in proportion (log-log)."""
        predicted = np.log(np.maximum(basis.loss.numpy(), _FLOOR))
        x = predicted[list(self.ranks)]
        y = np.log(np.maximum(self.losses, _FLOOR))
        order = np.argsort(x)
        x, y = x[order], y[order]
        result = np.interp(predicted, x, y)
        low, high = predicted < x[0], predicted > x[-1]
        result[low] = y[0] + (predicted[low] - x[0])
        result[high] = y[-1] + (predicted[high] - x[-1])
        losses = np.exp(result)
        losses[basis.full_rank] = 0.0
        return np.minimum.accumulate(losses)


@dataclass(frozen=True)
class LayerCurves:
    """Loss curves of one layer."""

    key: LossCurve
    value: LossCurve


@dataclass(frozen=True)
class _Trial:
    layer: int
    part: str
    rank: int


def trials_of(bases: Sequence[LayerBases]) -> int:
    """Number of trials `probe` makes."""
    return len(_trials(bases))


def probe(
    skeleton: Skeleton,
    tokens: torch.Tensor,
    bases: Sequence[LayerBases],
    key_mode: KeyMode,
    step: Callable[[], None] = lambda: None,
    spill_limit: int = 4 << 30,
) -> list[LayerCurves]:
    """Measure loss curves on tokens [num_windows, length].

    Calls `step` once per trial and layer it passes, and once per trial at the end.
    """
    trials = _trials(bases)
    base = Stream(skeleton, tokens)
    shape = (len(trials), *base.hidden.shape)
    hidden = allocate(shape, spill_limit)
    family, geometry = skeleton.source.family, skeleton.source.geometry
    for index, item in enumerate(bases):
        layer = skeleton.layer(index)
        for number, trial in enumerate(trials):
            if trial.layer < index:
                hidden[number] = base.run(index, layer, hidden[number])
                step()
            elif trial.layer == index:
                key = item.key.at(trial.rank) if trial.part == "key" else None
                value = item.value.at(trial.rank) if trial.part == "value" else None
                with compress(layer, family, geometry, key_mode, key, value):
                    hidden[number] = base.run(index, layer, base.hidden)
                step()
        for _ in base.advance(index, layer):
            pass
    comparisons = [Comparison() for _ in trials]
    for row in range(len(tokens)):
        window = tokens[row : row + 1]
        exact = skeleton.logits(window, base.hidden[row : row + 1])
        for number, comparison in enumerate(comparisons):
            logits = skeleton.logits(window, hidden[number, row : row + 1])
            comparison.add(exact, logits, window)
    losses = {
        trial: comparison.result().kl_per_token
        for trial, comparison in zip(trials, comparisons, strict=True)
    }
    return [
        LayerCurves(_curve(losses, index, "key"), _curve(losses, index, "value"))
        for index in range(len(bases))
    ]


def steps_of(bases: Sequence[LayerBases]) -> int:
    """How often `probe` calls `step`."""
    return sum(len(bases) - trial.layer for trial in _trials(bases))


def _trials(bases: Sequence[LayerBases]) -> list[_Trial]:
    return [
        _Trial(index, part, rank)
        for index, item in enumerate(bases)
        for part, basis in (("key", item.key), ("value", item.value))
        for rank in _ranks(basis.full_rank)
    ]


def _ranks(full_rank: int) -> list[int]:
    return sorted({min(max(1, math.floor(full_rank * share)), full_rank) for share in SHARES})


def _curve(losses: dict[_Trial, float], layer: int, part: str) -> LossCurve:
    found = sorted(
        (trial.rank, loss)
        for trial, loss in losses.items()
        if trial.layer == layer and trial.part == part
    )
    ranks = tuple(rank for rank, _ in found)
    values = np.maximum.accumulate([max(loss, _FLOOR) for _, loss in found][::-1])[::-1]
    return LossCurve(ranks, tuple(float(value) for value in values))
