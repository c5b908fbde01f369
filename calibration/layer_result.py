# SPDX-License-Identifier: Apache-2.0
"""What ranks are allocated from: one layer's bases, and its error curve where that is measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_eigen.calibration.methods.basis import LayerBases


@dataclass(frozen=True)
class ErrorCurve:
    """Relative error of one decoder layer's output at falling thresholds.

    Attributes:
        thresholds: descending from 1.
        errors: ||output - exact|| / ||exact||, Frobenius norms over the probe windows.
    """

    thresholds: tuple[float, ...]
    errors: tuple[float, ...]

    def threshold_at(self, budget: float) -> float:
        """Lowest threshold whose interpolated error is within the budget."""
        errors = np.maximum.accumulate(self.errors)
        # A tiny slope keeps flat stretches invertible: the lowest threshold of a stretch wins.
        errors = errors + np.arange(len(errors)) * 1e-12
        return float(np.interp(budget, errors, self.thresholds))

    def error_at(self, threshold: float) -> float:
        """Interpolated error at a threshold."""
        return float(np.interp(threshold, self.thresholds[::-1], self.errors[::-1]))


@dataclass(frozen=True)
class LayerResult:
    """What the pass over the layers found for one layer.

    Attributes:
        bases: full-width bases of keys and values.
        errors: the layer's output error against the threshold, where the allocation reads it.
    """

    bases: LayerBases
    errors: ErrorCurve | None = None
