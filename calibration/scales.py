"""The scales of an fp8 cache, and what such a cache does to the latents it holds.

A layer's cache stores `k' / k_scale` and `v' / v_scale` in float8_e4m3. The scales bring the
largest latents of the calibration text just below the type's limit. Finer hardly matters to a
floating type; latents beyond the limit saturate, as in the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from calibration.methods.base import LayerBases
from calibration.stream import Skeleton, Stream
from calibration.taps import Latents, Part, compress
from vllm_eigen.checkpoint import LayerRanks
from vllm_eigen.families import KeyMode

TOKENS = 16384
"""Tokens of the calibration windows whose latents are looked at."""
MARGIN = 1.25
"""Room above the largest latent seen, for text that was not."""
_LIMIT = torch.finfo(torch.float8_e4m3fn).max


class Peak:
    """Looks at a layer's latents as they pass and keeps their largest magnitude."""

    def __init__(self) -> None:
        self._found: dict[Part, float] = {"key": 0.0, "value": 0.0}

    def __call__(self, part: Part, latents: torch.Tensor) -> torch.Tensor:
        """Hands back what it is given."""
        self._found[part] = max(self._found[part], float(latents.detach().abs().max()))
        return latents

    def scaled(self, ranks: LayerRanks) -> LayerRanks:
        """The ranks with the scales that suit what was seen."""
        scale = {part: MARGIN * peak / _LIMIT or 1.0 for part, peak in self._found.items()}
        return ranks.model_copy(update={"k_scale": scale["key"], "v_scale": scale["value"]})


def fit_scales(
    skeleton: Skeleton,
    tokens: torch.Tensor,
    bases: Sequence[LayerBases],
    ranks: Sequence[LayerRanks],
    key_mode: KeyMode,
    step: Callable[[], None] = lambda: None,
) -> list[LayerRanks]:
    """The ranks with scales, from the first windows of tokens [num_windows, length].

    The windows flow through the compressed layers, as they will when served; `step` is called once
    a layer.
    """
    stream = Stream(skeleton, tokens[: max(1, TOKENS // tokens.shape[1])])
    family, geometry = skeleton.source.family, skeleton.source.geometry
    scaled = []
    for index, (item, rank) in enumerate(zip(bases, ranks, strict=True)):
        layer, peak = skeleton.layer(index), Peak()
        maps = item.key.at(rank.rank_k), item.value.at(rank.rank_v)
        with compress(layer, family, geometry, key_mode, *maps, latents=peak):
            for _ in stream.advance(index, layer):
                pass
        scaled.append(peak.scaled(rank))
        step()
    return scaled


def fp8_cache(ranks: LayerRanks) -> Latents:
    """What a layer reads back from an fp8 cache, in the type it had."""
    scales: dict[Part, float] = {"key": ranks.k_scale, "value": ranks.v_scale}

    def read_back(part: Part, latents: torch.Tensor) -> torch.Tensor:
        stored = (latents / scales[part]).clamp(-_LIMIT, _LIMIT).to(torch.float8_e4m3fn)
        return stored.to(latents.dtype) * scales[part]

    return read_back
