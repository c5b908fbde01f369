"""Spend one byte budget over all layers, keys and values, where it saves most measured loss.

Each layer's keys alone, then its values alone, are cut to a few ranks and the KL divergence of
the whole model's next-token distributions from the base model's is measured. Between those ranks
the loss follows the bases' own predicted loss (linear in logarithms); losses of different parts
are taken to add up. The best ranks for the budget then come from an exact dynamic programme.

All variants stream through the layers together, so that one layer is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.methods.base import Basis, LayerBases
from calibration.metrics import Comparison
from calibration.stream import SPILL_LIMIT, Skeleton, Stream
from calibration.stream import allocate as storage
from calibration.taps import compress
from vllm_eigen.checkpoint import LayerRanks
from vllm_eigen.errors import UsageError
from vllm_eigen.families import KeyMode

POINTS = (0.2, 0.5, 0.8)
"""Shares of the full rank at which the loss is measured."""
PROBE_TOKENS = 4096
"""Tokens on which it is measured: whole windows, at least one."""
_SMALLEST = 1e-9
"""Nats a token that stand for no measurable loss."""

Loss = NDArray[np.float64]
"""Loss of one layer's keys or values at every rank, [full_rank + 1]: from rank 0 to 0.0."""


@dataclass(frozen=True)
class LayerLoss:
    """Expected loss of a layer in nats a token, by rank, with everything else uncompressed."""

    key: Loss
    value: Loss


def allocate(
    losses: Sequence[LayerLoss], kv_ratio: float, granularity: int = 1
) -> tuple[list[LayerRanks], float]:
    """The ranks of least total loss within a KV budget, and that loss.

    Args:
        losses: one per layer.
        kv_ratio: bytes relative to the uncompressed cache, above 0 and at most 1.
        granularity: ranks are multiples of it, or full.

    Raises:
        UsageError: the budget is below the smallest rank everywhere.
    """
    parts = [part for layer in losses for part in (layer.key, layer.value)]
    full = sum(len(part) - 1 for part in parts)
    budget = int(kv_ratio * full + 0.5)
    choices = [_choices(len(part) - 1, granularity) for part in parts]
    least = sum(int(ranks[0]) for ranks in choices)
    if budget < least:
        raise UsageError(
            f"--kv-ratio {kv_ratio:g} is below the smallest this model allows "
            f"({least / full:.3f}); ask for more"
        )
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    taken: list[NDArray[np.int32]] = []
    for part, ranks in zip(parts, choices, strict=True):
        value = np.full(budget + 1, np.inf)
        chosen = np.zeros(budget + 1, dtype=np.int32)
        for rank in ranks[ranks <= budget]:
            candidate = best[: budget + 1 - rank] + part[rank]
            better = candidate < value[rank:]
            value[rank:][better] = candidate[better]
            chosen[rank:][better] = rank
        best = value
        taken.append(chosen)
    left = int(budget - np.argmin(best[::-1]))
    loss = float(best[left])
    result: list[int] = []
    for chosen in reversed(taken):
        result.append(int(chosen[left]))
        left -= result[-1]
    result.reverse()
    pairs = zip(result[::2], result[1::2], strict=True)
    return [LayerRanks(rank_k=key, rank_v=value) for key, value in pairs], loss


def measure_losses(
    skeleton: Skeleton,
    tokens: torch.Tensor,
    bases: Sequence[LayerBases],
    key_mode: KeyMode,
    step: Callable[[], None] = lambda: None,
    *,
    spill_limit: int = SPILL_LIMIT,
    spill_folder: Path | None = None,
) -> list[LayerLoss]:
    """What every rank of every layer costs, measured on some windows and interpolated.

    Args:
        tokens: [num_windows, length], the probe.
        bases: one per layer.
        step: called once per layer and once per window.
    """
    family, geometry = skeleton.source.family, skeleton.source.geometry
    base = Stream(skeleton, tokens)
    probed = [(probed_ranks(item.key), probed_ranks(item.value)) for item in bases]
    count = sum(len(ranks) for pair in probed for ranks in pair)
    variants = storage((count, *base.hidden.shape), spill_limit, spill_folder)
    started = 0
    for index, (item, pair) in enumerate(zip(bases, probed, strict=True)):
        layer = skeleton.layer(index)
        for variant in variants[:started]:
            variant.copy_(base.run(index, layer, variant))
        for basis, ranks, is_key in ((item.key, pair[0], True), (item.value, pair[1], False)):
            for rank in ranks:
                maps = basis.at(rank)
                key, value = (maps, None) if is_key else (None, maps)
                with compress(layer, family, geometry, key_mode, key, value):
                    variants[started] = base.run(index, layer, base.hidden)
                started += 1
        for _ in base.advance(index, layer):
            pass
        step()
    measured = _divergences(skeleton, tokens, base.hidden, variants, step)
    found = iter(measured)
    return [
        LayerLoss(
            interpolate(item.key, dict(zip(ranks_k, found, strict=False))),
            interpolate(item.value, dict(zip(ranks_v, found, strict=False))),
        )
        for item, (ranks_k, ranks_v) in zip(bases, probed, strict=True)
    ]


def probed_ranks(basis: Basis) -> list[int]:
    """Ranks at which the loss is measured, ascending; none for a basis of one direction."""
    full = basis.full_rank
    return sorted({min(full - 1, max(1, round(share * full))) for share in POINTS} - {0})


def interpolate(basis: Basis, measured: dict[int, float]) -> Loss:
    """Loss at every rank from the loss at some.

    The logarithm of the measured loss is piecewise linear in that of the predicted loss; past the
    outermost points measured and predicted loss are proportional. Strictly decreasing.
    """
    full = basis.full_rank
    predicted = np.log(np.maximum(basis.loss.numpy().astype(np.float64), 1e-15))
    ranks = sorted(measured)
    if not ranks:
        loss = np.exp(predicted)
    else:
        at = predicted[ranks]
        height = np.log(np.maximum([measured[rank] for rank in ranks], _SMALLEST))
        height = np.minimum.accumulate(height)
        inside = np.interp(predicted, at[::-1], height[::-1])
        outside = np.minimum(predicted - at[-1], 0) + np.maximum(predicted - at[0], 0)
        loss = np.exp(inside + outside)
    loss = np.minimum.accumulate(loss)
    loss[full] = 0.0
    # Equal losses would leave budget unspent: the larger rank is never worse.
    loss += _SMALLEST * 1e-3 * (1 - np.arange(full + 1) / full)
    result: Loss = loss
    return result


def _choices(full: int, granularity: int) -> NDArray[np.int64]:
    """Ranks that are allowed, ascending."""
    ranks = np.arange(granularity, full + 1, granularity)
    return ranks if full % granularity == 0 else np.append(ranks, full)


def _divergences(
    skeleton: Skeleton,
    tokens: torch.Tensor,
    base: torch.Tensor,
    variants: torch.Tensor,
    step: Callable[[], None],
) -> list[float]:
    """KL(base || variant) per token of every variant, hidden states [.., num_windows, length, n]."""
    comparisons = [Comparison() for _ in range(len(variants))]
    for row in range(len(tokens)):
        window = tokens[row : row + 1]
        exact = skeleton.logits(window, base[row : row + 1])
        for comparison, hidden in zip(comparisons, variants, strict=True):
            comparison.add(exact, skeleton.logits(window, hidden[row : row + 1]), window)
        step()
    return [comparison.result().kl_per_token for comparison in comparisons]
