# SPDX-License-Identifier: Apache-2.0
"""How much of the model's output is lost when one layer's keys or values alone are compressed.

For every layer, for its keys and for its values, a few ranks are tried on a few windows; what
counts is the Kullback-Leibler divergence of the final next-token distributions from the base
model's. All trials stream through the layers together, so that each layer is loaded once: trial
t of layer l joins at layer l and runs on uncompressed from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from vllm_eigen.calibration.evaluation.metrics import Comparison
from vllm_eigen.calibration.job import Job
from vllm_eigen.calibration.methods.basis import Basis, LayerBases
from vllm_eigen.calibration.model.activations import allocate
from vllm_eigen.calibration.model.hooks import compress

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


def loss_curves(job: Job, bases: Sequence[LayerBases]) -> list[LayerCurves]:
    """Loss curves of a job, measured on its first windows or found in its state."""
    stored = job.state.read_json("loss-curves")
    if stored is not None:
        return [LayerCurves(**{part: _stored(item[part]) for part in item}) for item in stored]
    curves = probe(job, job.first_windows(TOKENS), bases)
    job.state.write_json("loss-curves", [asdict(item) for item in curves])
    return curves


@dataclass(frozen=True)
class _Trial:
    layer: int
    part: str
    rank: int


def probe(job: Job, tokens: torch.Tensor, bases: Sequence[LayerBases]) -> list[LayerCurves]:
    """Measure loss curves on tokens [num_windows, length]."""
    model = job.model
    by_layer = dict(zip(model.compressed_layers, bases, strict=True))
    trials = _trials(by_layer)
    # A trial passes its own layer and those after it.
    job.reporter.stage("probing", sum(model.num_layers - trial.layer for trial in trials))
    base = job.stream(tokens)
    hidden = allocate((len(trials), *base.hidden.shape), job.memory_limit, job.state.folder)
    family, geometry = model.source.family, model.source.geometry
    for index in range(model.num_layers):
        layer = model.layer(index)
        for number, trial in enumerate(trials):
            if trial.layer < index:
                hidden[number] = base.run(index, layer, hidden[number])
                job.reporter.step()
            elif trial.layer == index:
                item = by_layer[index]
                key = item.key.at(trial.rank) if trial.part == "key" else None
                value = item.value.at(trial.rank) if trial.part == "value" else None
                with compress(layer, family, geometry, job.recipe.key_mode, key, value):
                    hidden[number] = base.run(index, layer, base.hidden)
                job.reporter.step()
        for _ in base.advance(index, layer):
            pass
    comparisons = [Comparison() for _ in trials]
    for row in range(len(tokens)):
        window = tokens[row : row + 1]
        exact = model.logits(window, base.hidden[row : row + 1])
        for number, comparison in enumerate(comparisons):
            logits = model.logits(window, hidden[number, row : row + 1])
            comparison.add(exact, logits, window)
    losses = {
        trial: comparison.result().kl_per_token
        for trial, comparison in zip(trials, comparisons, strict=True)
    }
    return [
        LayerCurves(_curve(losses, index, "key"), _curve(losses, index, "value"))
        for index in by_layer
    ]


def _trials(bases: Mapping[int, LayerBases]) -> list[_Trial]:
    return [
        _Trial(index, part, rank)
        for index, item in bases.items()
        for part, basis in (("key", item.key), ("value", item.value))
        for rank in _ranks(basis.full_rank)
    ]


def _ranks(full_rank: int) -> list[int]:
    return sorted({min(max(1, math.floor(full_rank * share)), full_rank) for share in SHARES})


def _stored(curve: Mapping[str, Sequence[float]]) -> LossCurve:
    return LossCurve(tuple(int(rank) for rank in curve["ranks"]), tuple(curve["losses"]))


def _curve(losses: dict[_Trial, float], layer: int, part: str) -> LossCurve:
    found = sorted(
        (trial.rank, loss)
        for trial, loss in losses.items()
        if trial.layer == layer and trial.part == part
    )
    ranks = tuple(rank for rank, _ in found)
    values = np.maximum.accumulate([max(loss, _FLOOR) for _, loss in found][::-1])[::-1]
    return LossCurve(ranks, tuple(float(value) for value in values))
