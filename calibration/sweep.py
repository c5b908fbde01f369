"""Calibrate one model again and again: quality against KV bytes, and against calibration samples.

What the reports' and benchmarks' curves are made of (paper, Fig. 3 and 4). Every point is measured
on the same held-out windows, offline in transformers' layers, in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from calibration.allocate import allocate_ranks
from calibration.layers import LayerPass
from calibration.measure import measure
from calibration.methods import get_method
from calibration.methods.base import LayerBases
from calibration.metrics import Quality
from calibration.probe import TOKENS, LayerCurves, probe, steps_of
from calibration.progress import Reporter
from calibration.ranks import ErrorCurve, budget_for_ratio, ranks_at, sweep
from calibration.refit import refit
from calibration.scales import fit_scales, fp8_cache
from calibration.source import Source
from calibration.state import State
from calibration.stream import Skeleton, Stream
from calibration.text import Windows
from vllm_eigen.checkpoint import LayerRanks
from vllm_eigen.errors import UsageError
from vllm_eigen.families import KeyMode

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
SAMPLES = (2, 8, 32, 128, 512)


@dataclass(frozen=True)
class Recipe:
    """How bases are made, and what for."""

    method: str
    key_mode: KeyMode
    head_group: int
    refit: bool


@dataclass(frozen=True)
class Point:
    """One calibration, measured.

    Attributes:
        kv_ratio: cached elements relative to the base model.
        samples: calibration windows.
        fp8: whether the cache was rounded to float8_e4m3, which halves the bytes of 16-bit ones.
    """

    kv_ratio: float
    samples: int
    fp8: bool
    quality: Quality

    @property
    def bytes_ratio(self) -> float:
        """KV bytes relative to the base model with a 16-bit cache."""
        return self.kv_ratio / 2 if self.fp8 else self.kv_ratio

    @property
    def increase(self) -> float:
        """Relative increase of perplexity, 0.02 for 2 %."""
        return self.quality.eigen_perplexity / self.quality.base_perplexity - 1


class Sweep:
    """Points of one model.

    Args:
        windows: calibration windows, and held-out windows to measure on.

    Raises:
        InputError: the weights cannot be used.
        UsageError: there are no held-out windows.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        windows: Windows,
        device: torch.device,
        reporter: Reporter,
    ) -> None:
        if not len(windows.held_out):
            raise UsageError(
                f"the text gives {windows.available} windows of {windows.chosen.shape[1]} tokens, "
                "none is left to measure on; pass more text or a smaller --seq-len"
            )
        self._recipe, self._windows, self._reporter = recipe, windows, reporter
        self._method = get_method(recipe.method)
        statistics = self._method.statistics(recipe.key_mode, recipe.head_group)
        eager = any(item.needs_probabilities for item in statistics)
        self._skeleton = Skeleton(source, device, eager=eager)

    def over_ratios(self, ratios: Sequence[float] = RATIOS) -> list[Point]:
        """One calibration, ranks for each ratio, measured with and without an fp8 cache."""
        chosen = self._windows.chosen
        ranks_for = self._calibrate(chosen)
        points = []
        for ratio in ratios:
            self._reporter.note(f"ratio {ratio:g}")
            try:
                bases, ranks = ranks_for(ratio)
            except UsageError as error:
                self._reporter.note(f"note: no point at {ratio:g}: {error}")
                continue
            points += self._points(bases, ranks, chosen, (False, True))
        return points

    def over_samples(self, ratio: float, samples: Sequence[int] = SAMPLES) -> list[Point]:
        """A calibration for each number of windows that the text gives, ranks for one ratio."""
        available = len(self._windows.chosen)
        counts = sorted({min(count, available) for count in samples})
        points = []
        for count in counts:
            self._reporter.note(f"{count} windows")
            chosen = self._windows.chosen[:count]
            bases, ranks = self._calibrate(chosen)(ratio)
            points += self._points(bases, ranks, chosen, (False,))
        return points

    def _calibrate(
        self, chosen: torch.Tensor
    ) -> Callable[[float], tuple[list[LayerBases], list[LayerRanks]]]:
        """Bases from some windows; returns what gives them with the ranks for a ratio."""
        recipe, skeleton = self._recipe, self._skeleton
        spends_globally = self._method.rank_rule == "global"
        state = self._state()
        layers = LayerPass(
            skeleton,
            self._method,
            recipe.key_mode,
            recipe.head_group,
            _no_curve if spends_globally else sweep,
        )
        results = layers.run(Stream(skeleton, chosen), state, self._reporter)
        state.discard()
        bases = [result.bases for result in results]
        curves: list[LayerCurves] = []
        if spends_globally:
            self._reporter.stage("probing", steps_of(bases))
            few = chosen[: max(1, TOKENS // chosen.shape[1])]
            curves = probe(skeleton, few, bases, recipe.key_mode, self._reporter.step)

        def ranks_for(ratio: float) -> tuple[list[LayerBases], list[LayerRanks]]:
            if ratio >= 1:
                return bases, [ranks_at(item, 1.0) for item in bases]
            if spends_globally:
                return bases, allocate_ranks(bases, curves, ratio)
            _, thresholds = budget_for_ratio(bases, [item.curve for item in results], ratio)
            return bases, [ranks_at(*pair) for pair in zip(bases, thresholds, strict=True)]

        return ranks_for

    def _points(
        self,
        bases: Sequence[LayerBases],
        ranks: Sequence[LayerRanks],
        chosen: torch.Tensor,
        caches: Sequence[bool],
    ) -> list[Point]:
        """Measure ranks with the caches asked for, fp8 or not."""
        mode, step, skeleton = self._recipe.key_mode, self._reporter.step, self._skeleton
        full = sum(item.key.full_rank + item.value.full_rank for item in bases)
        kept = sum(item.rank_k + item.rank_v for item in ranks)
        compressed = skeleton
        if self._recipe.refit and kept < full:
            state = self._state()
            bases, compressed = refit(
                skeleton,
                Stream(skeleton, chosen),
                Stream(skeleton, chosen),
                bases,
                ranks,
                mode,
                self._recipe.head_group,
                state,
                self._reporter,
            )
            state.discard()
        points = []
        for fp8 in caches:
            self._reporter.stage("measuring", (1 + fp8) * skeleton.num_layers)
            if fp8:
                ranks = fit_scales(compressed, chosen, bases, ranks, mode, step)
            quality = measure(
                skeleton,
                self._windows.held_out,
                bases,
                ranks,
                mode,
                step,
                cache=fp8_cache if fp8 else None,
                compressed=compressed,
            )
            points.append(Point(kept / full, len(chosen), fp8, quality))
        return points

    @staticmethod
    def _state() -> State:
        """A state of this process alone; nothing of it is taken up again."""
        return State({"sweep": os.getpid()}, resume=False, provenance={})


def _no_curve(error_at: Callable[[float], float]) -> ErrorCurve:
    return ErrorCurve((1.0,), (0.0,))
