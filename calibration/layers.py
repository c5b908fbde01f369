"""The streaming pass: for each decoder layer its moments, its bases and its error curve.

Second to fourth step of the flow. The text's hidden states are those of the uncompressed model,
so layers do not depend on each other's ranks and the pass is made once, whatever is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from calibration.methods.base import Layer, LayerBases, Method, Moments
from calibration.moments import Accumulator
from calibration.progress import Reporter
from calibration.ranks import ErrorCurve, error_function
from calibration.state import LayerResult, State
from calibration.stream import Skeleton, Stream
from calibration.taps import capture, compress
from vllm_eigen.checkpoint import LayerRanks
from vllm_eigen.errors import InputError
from vllm_eigen.families import KeyMode
from vllm_eigen.kernels.planes import latent_order

PROBE_TOKENS = 2048
"""Tokens on which layer errors are measured: whole windows, at least two."""

CurveRule = Callable[[Callable[[float], float]], ErrorCurve]
"""Samples the layer's error as a function of the threshold: one of `ranks.sweep` and
`ranks.algorithm_1`."""


class LayerPass:
    """Runs one method over all layers of a model.

    Args:
        skeleton: the model.
        method: makes the bases.
        key_mode, head_group: what they are for.
        curve: how the error curve is sampled.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        method: Method,
        key_mode: KeyMode,
        head_group: int,
        curve: CurveRule,
    ) -> None:
        self._skeleton = skeleton
        self._method = method
        self._key_mode: KeyMode = key_mode
        self._head_group = head_group
        self._curve = curve
        self._family = skeleton.source.family
        self._geometry = skeleton.source.geometry

    def run(self, stream: Stream, state: State, reporter: Reporter) -> list[LayerResult]:
        """Results of all layers; those that `state` holds already are only streamed through.

        Raises:
            InputError: a layer's output is not finite.
        """
        layers = self._skeleton.num_layers
        reporter.stage("calibrating", layers * (stream.batches + 1))
        results: list[LayerResult] = []
        for index in range(layers):
            layer = self._skeleton.layer(index)
            found = state.load(index)
            if found is None:
                found = self._visit(index, layer, stream, reporter)
                # As a resumed run would have it: strides, too, change the last bit of a product.
                found = state.save(index, found)
            elif index + 1 < layers:
                # In the same way as it was found: the last bit depends on it.
                with self._skeleton.probabilities(layer):
                    for _ in stream.advance(index, layer):
                        reporter.step()
            reporter.step()
            results.append(found)
        return results

    def _visit(
        self, index: int, layer: nn.Module, stream: Stream, reporter: Reporter
    ) -> LayerResult:
        count = max(2, PROBE_TOKENS // stream.hidden.shape[1])
        inputs = stream.hidden[:count].clone()
        accumulator = Accumulator(
            self._method.statistics(self._key_mode, self._head_group),
            self._geometry,
            self._skeleton.device,
        )
        with (
            self._skeleton.probabilities(layer),
            capture(layer, self._family, self._geometry, accumulator.add),
        ):
            for _ in stream.advance(index, layer):
                reporter.step()
        if not all(bool(torch.isfinite(window).all()) for window in stream.hidden):
            raise InputError(
                f"{self._skeleton.source.folder}: layer {index} gives NaN or infinity; its weights "
                "are damaged or too large for float32"
            )
        exact = stream.hidden[:count]
        bases = self._bases(index, layer, accumulator.moments())
        scale = torch.linalg.vector_norm(exact, dtype=torch.float64).clamp(min=1e-300)

        def error(ranks: LayerRanks) -> float:
            maps = bases.key.at(ranks.rank_k), bases.value.at(ranks.rank_v)
            with compress(layer, self._family, self._geometry, self._key_mode, *maps):
                output = stream.run(index, layer, inputs)
            difference = torch.linalg.vector_norm(output - exact, dtype=torch.float64)
            return float(difference / scale)

        return LayerResult(bases, self._curve(error_function(error, bases)))

    def _bases(self, index: int, layer: nn.Module, moments: Moments) -> LayerBases:
        o_proj = layer.get_submodule(f"{self._family.attention}.{self._family.o_proj}").weight
        assert isinstance(o_proj, torch.Tensor)
        size, frequencies = self._geometry.head_size, self._skeleton.inverse_frequencies()
        bases = self._method.bases(
            Layer(
                index=index,
                geometry=self._geometry,
                moments=moments,
                o_proj=o_proj.detach().cpu().double().reshape(o_proj.shape[0], -1, size),
                key_mode=self._key_mode,
                head_group=self._head_group,
                inverse_frequencies=frequencies,
            )
        )
        if self._key_mode != "pre-rope" or frequencies is None:
            return bases
        order = latent_order(size, 2 * len(frequencies), self._head_group)
        return replace(bases, key=replace(bases.key, order=order))
