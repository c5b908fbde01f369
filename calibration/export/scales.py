# SPDX-License-Identifier: Apache-2.0
"""The scales of an fp8 cache, and what such a cache does to the latents it holds.

A layer's cache stores `k' / k_scale` and `v' / v_scale` in float8_e4m3. The scales bring the
largest latents of the calibration text just below the type's limit; rotated keys (post-rope) get
room for what their RoPE pairs reach at other positions. Finer scales hardly matter to
a floating-point type; latents beyond the limit saturate, as in the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from vllm_eigen.calibration.export.even import even_out
from vllm_eigen.calibration.model.hooks import Part, SimulatedCache
from vllm_eigen.calibration.truncated import TruncatedModel
from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.checkpoint.modes import KeyMode

TOKENS = 16384
"""Tokens of the calibration windows whose latents are looked at."""
MARGIN = 1.25
"""Headroom above the largest latent of the calibration text, for other text."""
_LIMIT = torch.finfo(torch.float8_e4m3fn).max


class Peak:
    """Records the largest magnitude of a layer's latents and returns them unchanged."""

    def __init__(self) -> None:
        self._found: dict[Part, float] = {"key": 0.0, "value": 0.0}

    def __call__(self, part: Part, latents: torch.Tensor) -> torch.Tensor:
        """Record; the latents are of any shape."""
        self._found[part] = max(self._found[part], float(latents.detach().abs().max()))
        return latents

    def scaled(self, ranks: LayerRanks, key_mode: KeyMode) -> LayerRanks:
        """The ranks with the scales for what was recorded."""
        # At another position a RoPE pair (x, x) may be (sqrt(2) x, 0).
        turned = math.sqrt(2) if key_mode.caches_rotated_keys else 1.0
        margin: dict[Part, float] = {"key": turned * MARGIN, "value": MARGIN}
        scale = {part: margin[part] * peak / _LIMIT or 1.0 for part, peak in self._found.items()}
        return ranks.model_copy(update={"k_scale": scale["key"], "v_scale": scale["value"]})


def fit_scales(
    compressed: TruncatedModel, tokens: torch.Tensor, step: Callable[[], None] = lambda: None
) -> TruncatedModel:
    """The same model with even latents and their scales, from the first windows of tokens.

    The windows, [num_windows, length], are streamed through the compressed layers, as they will be
    when served; `step` is called once a layer.
    """
    compressed = even_out(compressed)
    peaks: list[Peak] = []

    def watch(ranks: LayerRanks) -> SimulatedCache:
        peaks.append(Peak())
        return peaks[-1]

    compressed.run(tokens[: max(1, TOKENS // tokens.shape[1])], cache=watch, step=step)
    pairs = zip(peaks, compressed.ranks, strict=True)
    scaled = tuple(peak.scaled(rank, compressed.key_mode) for peak, rank in pairs)
    return replace(compressed, ranks=scaled)


def fp8_cache(ranks: LayerRanks) -> SimulatedCache:
    """What a layer reads back from an fp8 cache, in the type it had."""
    scales: dict[Part, float] = {"key": ranks.k_scale, "value": ranks.v_scale}

    def read_back(part: Part, latents: torch.Tensor) -> torch.Tensor:
        stored = (latents / scales[part]).clamp(-_LIMIT, _LIMIT).to(torch.float8_e4m3fn)
        return stored.to(latents.dtype) * scales[part]

    return read_back
