# SPDX-License-Identifier: Apache-2.0
"""The stages that every calibration goes through, up to the compressed model.

    statistics, or gradients -> bases -> (loss curves) -> ranks -> refit

`pipeline` allocates one size and writes it; sweeps and benchmarks allocate many sizes of one
calibration and measure them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from vllm_eigen.calibration.allocation.allocate import Allocation, allocate, curve_rule
from vllm_eigen.calibration.allocation.probe import LayerCurves, loss_curves
from vllm_eigen.calibration.export.refit import refit
from vllm_eigen.calibration.export.residual import check_plain_residual
from vllm_eigen.calibration.gradient_layers import gradient_layers
from vllm_eigen.calibration.job import Job
from vllm_eigen.calibration.layer_pass import run_layers
from vllm_eigen.calibration.methods.base import GradientMethod
from vllm_eigen.calibration.methods.basis import LayerBases
from vllm_eigen.calibration.target import Target
from vllm_eigen.calibration.truncated import TruncatedModel
from vllm_eigen.checkpoint.config import LayerRanks


class Calibrator:
    """The bases of a job, made when it is constructed, and compressed models made of them.

    Args:
        job: model, recipe and text.
        target: the size that will be asked for, the smallest of several. It decides which errors
            the pass over the layers measures.

    Raises:
        InputError: a layer's output is not finite.
        UsageError: the model cannot be refitted.
    """

    def __init__(self, job: Job, target: Target) -> None:
        self._job = job
        assert job.recipe.rank_rule is not None, "coded latents have a calibrator of their own"
        self._rule = job.recipe.rank_rule
        if job.recipe.refit:
            check_plain_residual(job)
        method = job.recipe.method
        if isinstance(method, GradientMethod):
            self._layers = gradient_layers(job, method)
        else:
            self._layers = run_layers(job, curve_rule(target, self._rule))

    @property
    def bases(self) -> tuple[LayerBases, ...]:
        """Full-width bases, one per layer."""
        return tuple(layer.bases for layer in self._layers)

    def allocate(self, target: Target) -> Allocation:
        """Ranks of a size.

        Raises:
            UsageError: the ratio is out of the model's reach.
            InputError: the rank file cannot be used.
        """
        return allocate(target, self._rule, self._layers, lambda: self._loss_curves)

    def compress(self, ranks: Sequence[LayerRanks]) -> TruncatedModel:
        """The model at some ranks, its output projections refitted if the recipe says so."""
        job = self._job
        compressed = TruncatedModel(job.model, self.bases, tuple(ranks), job.recipe.key_mode)
        if job.recipe.refit and not all(map(compressed.is_lossless, range(job.model.num_layers))):
            return refit(job, compressed)
        return compressed

    @cached_property
    def _loss_curves(self) -> list[LayerCurves]:
        return loss_curves(self._job, self.bases)
