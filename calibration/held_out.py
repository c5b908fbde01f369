# SPDX-License-Identifier: Apache-2.0
"""Quality of compressed models on windows of text that were kept from calibration."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_eigen.calibration.evaluation.metrics import Comparison, Quality
from vllm_eigen.calibration.model.activations import ActivationStream, after_layers
from vllm_eigen.calibration.model.hooks import LayerCache
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.calibration.truncated import TruncatedModel


class HeldOut:
    """Windows to measure on; the base model runs once for all compressed models compared with it.

    Args:
        model: the base model.
        tokens: int64 [num_windows, length]
        step: called once a layer.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        tokens: torch.Tensor,
        step: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._tokens = model, tokens
        self._base = after_layers(model, tokens, step)

    def quality(
        self,
        compressed: TruncatedModel,
        *,
        cache: LayerCache | None = None,
        step: Callable[[], None] = lambda: None,
    ) -> Quality:
        """Averages over all windows; `step` once a layer.

        Args:
            cache: None keeps the latents as they are.

        Raises:
            InputError: a model's output is not finite.
        """
        stream = compressed.run(self._tokens, cache=cache, step=step)
        comparison = Comparison()
        for window in range(len(self._tokens)):
            self._compare(window, stream, comparison)
        return comparison.result()

    def quality_by_window(
        self, compressed: TruncatedModel, cache: LayerCache | None = None
    ) -> list[Quality]:
        """The same for every window alone.

        Raises:
            InputError: a model's output is not finite.
        """
        stream = compressed.run(self._tokens, cache=cache)
        comparisons = [Comparison() for _ in range(len(self._tokens))]
        for window, comparison in enumerate(comparisons):
            self._compare(window, stream, comparison)
        return [comparison.result() for comparison in comparisons]

    def _compare(self, window: int, stream: ActivationStream, comparison: Comparison) -> None:
        part = slice(window, window + 1)
        tokens = self._tokens[part]
        comparison.add(
            self._model.logits(tokens, self._base.hidden[part]),
            self._model.logits(tokens, stream.hidden[part]),
            tokens,
        )
