# SPDX-License-Identifier: Apache-2.0
"""What methods make of the gradient pass, layer by layer, kept where a run may be interrupted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from vllm_eigen.calibration.gradient_pass import gradient_pass
from vllm_eigen.calibration.job import Job
from vllm_eigen.calibration.layer_pass import in_latent_order
from vllm_eigen.calibration.layer_result import LayerResult
from vllm_eigen.calibration.methods.base import GradientMethod
from vllm_eigen.calibration.statistics.samples import LayerSamples

Result = TypeVar("Result")


def gradient_layers(job: Job, method: GradientMethod) -> list[LayerResult]:
    """Bases of the layers to compress; those that `job.state` holds are not made again.

    Raises:
        InputError: a layer's output or gradient is not finite.
    """

    def make(index: int, samples: LayerSamples) -> LayerResult:
        bases = in_latent_order(job, method.bases(job.cached(samples)))
        return job.state.save_layer(index, LayerResult(bases))

    return each_layer(job, job.state.load_layer, make)


def each_layer(
    job: Job,
    kept: Callable[[int], Result | None],
    make: Callable[[int, LayerSamples], Result],
) -> list[Result]:
    """One result of each layer to compress, first layer first.

    Args:
        kept: what an interrupted run left of a layer, or None.
        make: makes a layer's result, and keeps it.

    Raises:
        InputError: a layer's output or gradient is not finite.
    """
    found = {index: kept(index) for index in job.model.compressed_layers}
    missing = [index for index, result in found.items() if result is None]
    if missing:
        for index, samples in gradient_pass(job, max(missing) + 1):
            found[index] = make(index, samples)
            del samples  # not kept while the next layer's are made
    return [result for _, result in sorted(found.items()) if result is not None]
