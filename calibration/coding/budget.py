# SPDX-License-Identifier: Apache-2.0
"""The bytes that a KV ratio gives to coded latents."""

from __future__ import annotations

import math

from vllm_eigen.calibration.coding.values import codes_of
from vllm_eigen.checkpoint.codes import SCALE_BYTES, UNIT_BITS
from vllm_eigen.common.errors import UsageError


def bytes_for(kv_ratio: float, head_size: int) -> float:
    """Bytes of one head, token and layer, key and value, that a KV ratio allows.

    Raises:
        UsageError: the smallest codes take more.
    """
    full = 4 * head_size
    least = UNIT_BITS // 8 + codes_of(head_size)[0].num_bytes
    if kv_ratio * full < least:
        raise UsageError(
            f"--kv-ratio {kv_ratio:g} is out of reach; "
            f"ask for at least {math.ceil(1000 * least / full) / 1000:.3f}"
        )
    return kv_ratio * full


def most_bytes(head_size: int) -> int:
    """The same of 8 bits for every direction."""
    return 2 * head_size + SCALE_BYTES
