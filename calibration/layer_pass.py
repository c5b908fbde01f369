# SPDX-License-Identifier: Apache-2.0
"""The pass over the layers: statistics of the calibration text, each layer's bases and errors.

First stage of a calibration. The text's hidden states are those of the uncompressed model, so a
layer's result does not depend on other layers' ranks and one pass serves every size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from vllm_eigen.calibration.allocation.algorithm1 import ErrorFunction, error_function
from vllm_eigen.calibration.allocation.allocate import CurveRule
from vllm_eigen.calibration.job import Job
from vllm_eigen.calibration.layer_result import LayerResult
from vllm_eigen.calibration.methods.base import Layer, StatisticsMethod
from vllm_eigen.calibration.methods.basis import LayerBases
from vllm_eigen.calibration.model.activations import ActivationStream
from vllm_eigen.calibration.model.hooks import capture, compress_layer
from vllm_eigen.calibration.statistics.positions import Shifts
from vllm_eigen.calibration.statistics.statistic import Accumulator, Moments
from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.common.errors import InputError
from vllm_eigen.kernels.rope import latent_order

ERROR_TOKENS = 2048
"""Tokens on which layer errors are measured: whole windows, at least two."""


def run_layers(job: Job, curve: CurveRule | None) -> list[LayerResult]:
    """Results of the layers to compress; through others, and through those that `job.state`
    holds, the text is only streamed.

    Args:
        curve: how each layer's error is sampled; None: not at all.

    Raises:
        InputError: a layer's output is not finite.
    """
    model, reporter = job.model, job.reporter
    stream = job.stream(job.tokens)
    results: list[LayerResult] = []
    compressed = model.compressed_layers
    reporter.stage("calibrating", (compressed[-1] + 1) * (stream.batches + 1))
    for index in range(compressed[-1] + 1):
        layer = model.layer(index)
        if index not in compressed:
            for _ in stream.advance(index, layer):
                reporter.step()
            reporter.step()
            continue
        found = job.state.load_layer(index)
        if found is None:
            found = _calibrate(job, index, layer, stream, curve)
            # As a resumed run would have it: strides, too, change the last bit of a product.
            found = job.state.save_layer(index, found)
        elif index < compressed[-1]:
            # Eager or not as in the first run: the last bit depends on it.
            with model.probabilities(layer):
                for _ in stream.advance(index, layer):
                    reporter.step()
        reporter.step()
        results.append(found)
    return results


def _calibrate(
    job: Job, index: int, layer: nn.Module, stream: ActivationStream, curve: CurveRule | None
) -> LayerResult:
    """One layer's result; moves the stream past the layer."""
    source = job.model.source
    count = max(2, ERROR_TOKENS // stream.hidden.shape[1])
    inputs = stream.hidden[:count].clone()
    accumulator = Accumulator(
        job.recipe.statistics, source.geometry, job.model.device, _shifts(job)
    )
    with (
        job.model.probabilities(layer),
        capture(layer, source.family, source.geometry, accumulator.add),
    ):
        for _ in stream.advance(index, layer):
            job.reporter.step()
    if not all(bool(torch.isfinite(window).all()) for window in stream.hidden):
        raise InputError(
            f"{source.folder}: layer {index} gives NaN or infinity; its weights "
            "are damaged or too large for float32"
        )
    bases = _bases(job, index, accumulator.moments())
    if curve is None:
        return LayerResult(bases)
    probe = _ErrorProbe(job, index, layer, stream, inputs)
    return LayerResult(bases, curve(probe.error(bases)))


def _shifts(job: Job) -> Shifts | None:
    """Where windows may begin, as far as rotated keys are concerned."""
    frequencies = job.model.inverse_frequencies()
    last = job.model.source.rotary_positions - job.tokens.shape[1]
    if frequencies is None or last < 1:
        return None
    return Shifts(frequencies, last, job.model.source.family.interleaved)


def _bases(job: Job, index: int, moments: Moments) -> LayerBases:
    """The method's bases; those of reconstructed keys in triangular (QR) latent order."""
    recipe, geometry = job.recipe, job.model.source.geometry
    layer = Layer(index, geometry, moments, recipe.key_mode, recipe.head_group)
    assert isinstance(recipe.method, StatisticsMethod)
    return in_latent_order(job, recipe.method.bases(layer))


def in_latent_order(job: Job, bases: LayerBases) -> LayerBases:
    """Bases of keys that attention reconstructs get the order that it reads least of."""
    recipe, geometry = job.recipe, job.model.source.geometry
    frequencies = job.model.inverse_frequencies()
    if not recipe.key_mode.reconstructs_keys or frequencies is None:
        return bases
    order = latent_order(
        geometry.head_size,
        2 * len(frequencies),
        recipe.head_group,
        is_neox_style=not job.model.source.family.interleaved,
    )
    return replace(bases, key=replace(bases.key, order=order))


@dataclass(frozen=True)
class _ErrorProbe:
    """Measures a layer's relative output error.

    Attributes:
        index, layer: the layer.
        stream: the hidden states after it.
        inputs: those of the first windows before it.
    """

    job: Job
    index: int
    layer: nn.Module
    stream: ActivationStream
    inputs: torch.Tensor

    def error(self, bases: LayerBases) -> ErrorFunction:
        """The error against the threshold."""
        exact = self.stream.hidden[: len(self.inputs)]
        scale = torch.linalg.vector_norm(exact, dtype=torch.float64).clamp(min=1e-300)
        source, key_mode = self.job.model.source, self.job.recipe.key_mode

        def measure(ranks: LayerRanks) -> float:
            maps = bases.at(ranks)
            with compress_layer(self.layer, source.family, source.geometry, key_mode, maps):
                output = self.stream.run(self.index, self.layer, self.inputs)
            difference = torch.linalg.vector_norm(output - exact, dtype=torch.float64)
            return float(difference / scale)

        return error_function(measure, bases)
