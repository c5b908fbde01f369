"""Measure ranks on windows of text while the layers stream: base and compressed side by side.

Used after the ranks are chosen, for the numbers in the model card, and by the allocator. The
compressed model is the base whose keys and values pass through the maps (`taps.compress`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from calibration.methods.base import LayerBases
from calibration.metrics import Comparison, Quality
from calibration.stream import Skeleton, Stream
from calibration.taps import Latents, compress
from vllm_eigen.checkpoint import LayerRanks
from vllm_eigen.families import KeyMode


def measure(
    skeleton: Skeleton,
    tokens: torch.Tensor,
    bases: Sequence[LayerBases],
    ranks: Sequence[LayerRanks],
    key_mode: KeyMode,
    step: Callable[[], None] = lambda: None,
    cache: Callable[[LayerRanks], Latents] | None = None,
    compressed: Skeleton | None = None,
) -> Quality:
    """Quality of the compressed model on tokens [num_windows, length]; `step` once per layer.

    Args:
        cache: what a layer's cache does to its latents, by the layer's ranks; None: nothing.
        compressed: gives the compressed model's layers where they have weights of their own.
    """
    base, eigen = Stream(skeleton, tokens), Stream(skeleton, tokens)
    family, geometry = skeleton.source.family, skeleton.source.geometry
    for index, (item, rank) in enumerate(zip(bases, ranks, strict=True)):
        layer = skeleton.layer(index)
        for _ in base.advance(index, layer):
            pass
        if compressed is not None:
            layer = compressed.layer(index)
        maps = item.key.at(rank.rank_k), item.value.at(rank.rank_v)
        latents = None if cache is None else cache(rank)
        with compress(layer, family, geometry, key_mode, *maps, latents=latents):
            for _ in eigen.advance(index, layer):
                pass
        step()
    comparison = Comparison()
    for row in range(len(tokens)):
        window = tokens[row : row + 1]
        comparison.add(
            skeleton.logits(window, base.hidden[row : row + 1]),
            skeleton.logits(window, eigen.hidden[row : row + 1]),
            window,
        )
    return comparison.result()
