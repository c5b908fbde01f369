# SPDX-License-Identifier: Apache-2.0
"""Tiles that fit the shared memory of GPUs of capability 9.0, 8.0 and 8.9."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels import KeyReconstruction, LayerSpec, RotaryTable, ScoreOptions

pytest.importorskip("triton")

HOPPER, AMPERE, ADA = 232_448, 166_912, 101_376
CODES = {
    "4 bits": Code(four=256, token_scale=True),
    "mixed": Code(eight=16, four=208, two=32),
    "8 bits": Code(eight=256),
    "2 bits": Code(eight=16, two=240),
}
RESIDENT = {
    (HOPPER, "4 bits"),
    (HOPPER, "mixed"),
    (HOPPER, "2 bits"),
    (AMPERE, "4 bits"),
}
"""Where a basis for heads of 256 stays in shared memory."""


def _prepared(code: Code, shared_bytes: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A layer as Gemma 3 has it: pre-RoPE keys, heads of 256, four query heads to one KV head."""
    from vllm_eigen.kernels.gpu import kernels

    monkeypatch.setattr(kernels, "_INTERPRETED", True)
    monkeypatch.setattr(kernels, "HOPPER_SHARED_BYTES", shared_bytes)
    rotary = RotaryTable.from_frequencies(torch.rand(128), 256)
    basis = torch.zeros(1, code.rank, 256, dtype=torch.bfloat16)
    value = Code(four=256, token_scale=True)
    layer = LayerSpec(
        *(4, 1, code.rank, value.rank, torch.bfloat16, torch.uint8),
        ScoreOptions(0.1),
        reconstruction=KeyReconstruction(basis, rotary),
        key_code=code,
        value_code=value,
    )
    return kernels.GpuKernels().prepare(layer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes that GPU's shared memory")
@pytest.mark.parametrize("shared_bytes", [HOPPER, AMPERE, ADA])
@pytest.mark.parametrize("name", CODES)
def test_coded_keys_of_256_fit(
    name: str, shared_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_eigen.kernels.gpu.tiles import Tile

    layer = _prepared(CODES[name], shared_bytes, monkeypatch)
    assert layer.decode.streams == ((shared_bytes, name) not in RESIDENT)
    # 64 keys fill the rows of a matrix product of Hopper.
    assert layer.decode.block_n >= 64
    assert layer.decode.num_stages == (3 if shared_bytes == HOPPER else 1) or layer.decode.streams
    widest = Tile(32, 128, 8, 1, swap_ab=True, streams=True)
    halved = replace(widest, block_n=64, num_warps=4)
    assert layer.prefill == (halved if (shared_bytes, name) == (ADA, "8 bits") else widest)
