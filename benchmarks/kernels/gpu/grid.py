# SPDX-License-Identifier: Apache-2.0
"""The points that `bench gpu` checks and times."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from vllm_eigen.benchmarks.kernels.gpu.points import GpuPoint
from vllm_eigen.checkpoint.modes import KeyMode

CACHES = ((16, 0.6), (8, 1.0), (4, 1.0), (2, 1.0))
"""Bits of a cached number, and ranks over head size."""
MODES = (KeyMode.NO_ROPE, KeyMode.PRE_ROPE)
"""Keys scored as they are cached, and keys reconstructed and rotated; post-rope is as the first."""


def checked(quick: bool) -> Iterator[GpuPoint]:
    """Every kernel, at lengths that fill no block and several splits."""
    for size, mode, (bits, ratio) in product((64, 128, 256), MODES, CACHES):
        if quick and size != 128:
            continue
        for phase, context, batch in (("decode", 1337, 5), ("prefill", 200, 2)):
            yield GpuPoint(32, 8, size, mode, phase, context, batch, bits, ratio)


def timed(quick: bool) -> Iterator[GpuPoint]:
    """Decode of short and long contexts, and prompts, at heads of 128."""
    steps = [("decode", 32_768, 32), ("decode", 32_768, 1), ("decode", 512, 32)]
    steps += [("prefill", 2048, 4)]
    if quick:
        steps = [("decode", 4096, 4), ("prefill", 512, 1)]
    for (phase, context, batch), mode, (bits, ratio) in product(steps, MODES, CACHES):
        yield GpuPoint(32, 8, 128, mode, phase, context, batch, bits, ratio)
    if not quick:
        for mode, (bits, ratio) in product(MODES, CACHES):
            yield GpuPoint(32, 32, 128, mode, "decode", 8192, 16, bits, ratio)
