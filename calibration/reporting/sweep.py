# SPDX-License-Identifier: Apache-2.0
"""Calibrate one model again and again: quality against KV bytes, and against calibration samples.

What the reports' and benchmarks' curves are made of (paper, Fig. 3 and 4). Every point is measured
on the same held-out windows, offline in transformers' layers, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_eigen.calibration.calibrator import Calibrator
from vllm_eigen.calibration.coded_calibrator import CodedCalibrator
from vllm_eigen.calibration.evaluation.metrics import Quality
from vllm_eigen.calibration.export.scales import fit_scales, fp8_cache
from vllm_eigen.calibration.held_out import HeldOut
from vllm_eigen.calibration.job import Job, Recipe
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.calibration.model.source import Source
from vllm_eigen.calibration.model.text import Windows
from vllm_eigen.calibration.state import State
from vllm_eigen.calibration.target import Target
from vllm_eigen.calibration.truncated import TruncatedModel
from vllm_eigen.common.errors import UsageError
from vllm_eigen.common.progress import Reporter

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
CODED_RATIOS = (0.5, 0.4, 0.34, 0.27, 0.21, 0.16)
"""Of coded latents, which take half the bytes at most."""
SAMPLES = (2, 8, 32, 128, 512)


@dataclass(frozen=True)
class SweepPoint:
    """One calibration, measured.

    Attributes:
        kv_ratio: cached bytes relative to the base model, of 16 bits unless `fp8`.
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


def calibrator_of(job: Job, smallest: Target) -> Calibrator | CodedCalibrator:
    """The calibrator of a job's method, for several sizes."""
    return CodedCalibrator(job) if job.recipe.coded else Calibrator(job, smallest)


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
        self._model = LayerwiseModel(source, device, eager=recipe.needs_probabilities)

    def over_ratios(self, ratios: Sequence[float] | None = None) -> list[SweepPoint]:
        """One calibration, ranks for each ratio; 16-bit latents with and without an fp8 cache."""
        ratios = ratios or (CODED_RATIOS if self._recipe.coded else RATIOS)
        job = self._job(self._windows.chosen)
        calibrator = calibrator_of(job, Target(min(ratios)))
        points = []
        for ratio in ratios:
            self._reporter.note(f"ratio {ratio:g}")
            try:
                allocation = calibrator.allocate(Target(ratio))
            except UsageError as error:
                self._reporter.note(f"note: no point at {ratio:g}: {error}")
                continue
            compressed = calibrator.compress(allocation.ranks)
            points.append(self._point(job, compressed))
            if self._recipe.coded:
                continue
            self._reporter.stage("scaling", self._model.num_layers)
            scaled = fit_scales(compressed, job.tokens, self._reporter.step)
            points.append(self._point(job, scaled, fp8=True))
        return points

    def over_samples(self, ratio: float, samples: Sequence[int] = SAMPLES) -> list[SweepPoint]:
        """A calibration for each number of windows that the text gives, ranks for one ratio."""
        available = len(self._windows.chosen)
        points = []
        for count in sorted({min(count, available) for count in samples}):
            self._reporter.note(f"{count} windows")
            job, target = self._job(self._windows.chosen[:count]), Target(ratio)
            calibrator = calibrator_of(job, target)
            compressed = calibrator.compress(calibrator.allocate(target).ranks)
            points.append(self._point(job, compressed))
        return points

    @cached_property
    def _held_out(self) -> HeldOut:
        return HeldOut(self._model, self._windows.held_out)

    def _job(self, tokens: torch.Tensor) -> Job:
        return Job(self._model, self._recipe, tokens, State(), self._reporter)

    def _point(self, job: Job, compressed: TruncatedModel, *, fp8: bool = False) -> SweepPoint:
        self._reporter.stage("measuring", self._model.num_layers)
        cache, step = fp8_cache if fp8 else None, self._reporter.step
        quality = self._held_out.quality(compressed, cache=cache, step=step)
        return SweepPoint(compressed.kv_ratio, len(job.tokens), fp8, quality)
