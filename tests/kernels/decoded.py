# SPDX-License-Identifier: Apache-2.0
"""What a coded latent stands for, in float64: `checkpoint.codes` written down again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vllm_eigen.checkpoint.codes import Code

Array = NDArray[np.float64]


def decoded(x: Array, code: Code) -> Array:
    """What `checkpoint.codes` says that latents `[..., rank]` become, in float64."""
    levels = 2.0 ** np.array(code.widths)
    middle = (levels - 1) / 2
    scale = np.ones(x.shape[:-1])
    if code.token_scale:
        wide = np.array(code.widths) > 2
        needed = (np.abs(x) / middle)[..., wide].max(axis=-1)
        needed = np.where(np.isnan(x).any(axis=-1), np.nan, needed)
        scale = _bf16_rounded_up(np.maximum(code.scale_floor, needed))
    with np.errstate(invalid="ignore", over="ignore"):  # 0 / 0
        # Steps are counted in float32, as a kernel does.
        steps = np.nan_to_num(x.astype(np.float32) / scale[..., None].astype(np.float32))
        codes = np.clip(np.floor(steps) + levels / 2, 0, levels - 1)
    return np.asarray((codes - middle) * scale[..., None])


def _bf16_rounded_up(x: Array) -> Array:
    """By the definition: the least number of 8 significant bits that is not below."""
    fraction, exponent = np.frexp(x)
    return np.asarray(np.ldexp(np.ceil(fraction * 256) / 256, exponent))
