# SPDX-License-Identifier: Apache-2.0
"""The base model with truncated bases in its attention, streamed layer by layer.

The stages after allocation work on it: scales are fitted to its latents, its quality is measured,
and its bases are written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from vllm_eigen.calibration.methods.basis import LayerBases, LayerMaps
from vllm_eigen.calibration.model.activations import ActivationStream, after_layers
from vllm_eigen.calibration.model.hooks import LayerCache, coded_cache, compress_layer
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.checkpoint.modes import KeyMode


@dataclass(frozen=True)
class TruncatedModel:
    """The base model at some ranks.

    Attributes:
        model: the base model, with refitted output projections where there are.
        bases, ranks: one per layer that is compressed.
        key_mode: where keys are compressed.
    """

    model: LayerwiseModel
    bases: tuple[LayerBases | LayerMaps, ...]
    ranks: tuple[LayerRanks, ...]
    key_mode: KeyMode

    def position(self, index: int) -> int | None:
        """Where layer `index` is among those that are compressed; None: it is not."""
        compressed = self.model.compressed_layers
        return compressed.index(index) if index in compressed else None

    @property
    def kv_ratio(self) -> float:
        """Cached bytes relative to the base model's, as `EigenConfig.kv_ratio`."""
        kept = sum(rank.num_bytes(2) for rank in self.ranks)
        return kept / sum(2 * 2 * item.latent_size for item in self.bases)

    def is_lossless(self, index: int) -> bool:
        """Whether a layer has full rank and is not coded, or is not compressed at all."""
        position = self.position(index)
        if position is None:
            return True
        full, rank = self.bases[position].latent_size, self.ranks[position]
        return not rank.coded and (rank.rank_k, rank.rank_v) == (full, full)

    def hooks(self, index: int, layer: nn.Module, cache: LayerCache | None = None) -> ExitStack:
        """Until the result is closed, layer `index` computes with compressed keys and values."""
        position = self.position(index)
        if position is None:
            return ExitStack()
        source, rank = self.model.source, self.ranks[position]
        return compress_layer(
            layer,
            source.family,
            source.geometry,
            self.key_mode,
            self.bases[position].at(rank),
            coded_cache(rank) if cache is None else cache(rank),
        )

    def run(
        self,
        tokens: torch.Tensor,
        *,
        cache: LayerCache | None = None,
        step: Callable[[], None] = lambda: None,
    ) -> ActivationStream:
        """Hidden states of tokens [num_windows, length] after the last layer; `step` once a layer.

        Args:
            cache: None rounds coded latents as the kernels do, and keeps others as they are.
        """
        return after_layers(
            self.model, tokens, step, lambda index, layer: self.hooks(index, layer, cache)
        )
