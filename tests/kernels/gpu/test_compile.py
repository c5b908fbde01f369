# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compiled for Hopper, which needs no GPU: they build, fit and use wgmma.

The interpreter accepts much that the compiler refuses (a variable of two types, a block of odd
size), so both are needed. Run as a script it prints what the compiler made of each kernel.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from tests.kernels.gpu.compiling import Reports, reports

HOPPER_SHARED_BYTES = 232_448

# name: heads, KV heads, reconstructed heads a latent head, ranks, head size, rotary_dim, dtype,
# cache dtype
CASES: dict[str, tuple[Any, ...]] = {
    "folded": (32, 8, 1, 80, 72, 0, 0, torch.bfloat16, torch.bfloat16),
    "folded odd fp8": (8, 8, 1, 77, 33, 0, 0, torch.float16, torch.uint8),
    "many heads": (71, 1, 1, 40, 40, 0, 0, torch.bfloat16, torch.bfloat16),
    "pre-rope": (32, 8, 1, 80, 72, 128, 128, torch.bfloat16, torch.bfloat16),
    "pre-rope partial fp8": (8, 4, 1, 48, 48, 80, 32, torch.bfloat16, torch.uint8),
    "pre-rope 256": (16, 8, 1, 144, 160, 256, 256, torch.bfloat16, torch.bfloat16),
    "pre-rope groups": (32, 4, 2, 128, 128, 128, 128, torch.bfloat16, torch.bfloat16),
    "float32": (8, 8, 1, 128, 128, 0, 0, torch.float32, torch.float32),
}
# Compiled for decode alone.
DECODED: dict[str, tuple[Any, ...]] = {
    "64": (32, 8, 1, 32, 32, 0, 0, torch.bfloat16, torch.bfloat16),
    "128": (32, 8, 1, 64, 80, 0, 0, torch.bfloat16, torch.bfloat16),
    "256": (16, 8, 1, 128, 192, 0, 0, torch.bfloat16, torch.bfloat16),
    "pre-rope 64": (32, 8, 1, 32, 48, 64, 64, torch.bfloat16, torch.bfloat16),
    "pre-rope 256, 4 heads": (32, 8, 1, 128, 160, 256, 256, torch.bfloat16, torch.bfloat16),
    "128 fp8": (32, 8, 1, 128, 128, 0, 0, torch.bfloat16, torch.uint8),
    "pre-rope fp8": (32, 8, 1, 128, 128, 128, 128, torch.bfloat16, torch.uint8),
}
WIDE = (
    *("64", "128", "256", "folded", "pre-rope", "pre-rope 64", "pre-rope 256"),
    *("128 fp8", "pre-rope fp8", "pre-rope partial fp8"),
)
"""Ranks of heads of 64, 128 and 256 that begin on 16 bytes."""


@pytest.fixture(scope="module")
def compiled() -> Reports:
    pytest.importorskip("triton.backends.nvidia.compiler")
    return reports("tests.kernels.gpu.test_compile")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_fits_hopper(compiled: Reports, name: str) -> None:
    kernels = compiled[name]
    assert all(k["shared_bytes"] <= HOPPER_SHARED_BYTES for k in kernels)
    names = [k["name"] for k in kernels]
    assert names == ["write", "write", "write", "decode", "combine", "prefill"]
    _, down_projection, *_, prefill = kernels
    assert down_projection["wgmma"] > 0
    # Prompts with reconstructed heads of 256 do not get there: their tile is too small for wgmma.
    assert (prefill["wgmma"] > 0) == (name != "pre-rope 256")


@pytest.mark.parametrize("name", [name for name in (CASES | DECODED) if name != "float32"])
@pytest.mark.slow
def test_decode_spills_nothing(compiled: Reports, name: str) -> None:
    """16 bits and fp8; heads of 64, 128 and 256; folded and reconstructed. float32 is for tests."""
    assert all(k["shared_bytes"] <= HOPPER_SHARED_BYTES for k in compiled[name])
    [decode] = [kernel for kernel in compiled[name] if kernel["name"] == "decode"]
    assert decode["stack_bytes"] == 0, decode
    assert decode["wgmma"] > 0


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.slow
def test_decode_loads_16_bytes(compiled: Reports, name: str) -> None:
    [decode] = [kernel for kernel in compiled[name] if kernel["name"] == "decode"]
    # Whatever is not copied 16 bytes at once is a number, of a block table or of angles.
    _, _, _, rank_k, *_, cache_dtype = (CASES | DECODED)[name]
    tile = decode["block_n"] * cache_dtype.itemsize * (rank_k // 32 * 32)
    assert 16 * decode["threads"] * decode["wide_copies"] >= tile, decode
    assert decode["middling_copies"] == 0, decode


def _compile_all() -> Reports:
    """Call the kernels with a compiler in place of the launcher, for compute capability 9.0."""
    cases = CASES | DECODED
    return {
        name: [asdict(kernel) for kernel in _compile(case, name in DECODED)]
        for name, case in cases.items()
    }


def _compile(case: tuple[Any, ...], only_decode: bool) -> list[Any]:
    from vllm_eigen.benchmarks.kernels.gpu.compiled import compiling
    from vllm_eigen.kernels import (
        DownProjection,
        KeyReconstruction,
        LayerSpec,
        RotaryTable,
        ScoreOptions,
        Step,
    )
    from vllm_eigen.kernels.gpu.kernels import GpuKernels

    heads, kv_heads, group, rank_k, rank_v, head_size, rotary_dim, dtype, cache_dtype = case
    cache = torch.zeros(4, kv_heads, 64, rank_k + rank_v, dtype=cache_dtype)
    reconstruction = None
    if rotary_dim:
        rotary = RotaryTable.from_frequencies(torch.rand(rotary_dim // 2), 256)
        basis = torch.zeros(kv_heads * group, rank_k, head_size, dtype=dtype)
        reconstruction = KeyReconstruction(basis, rotary)
    spec = LayerSpec(
        heads,
        kv_heads,
        rank_k,
        rank_v,
        dtype,
        cache_dtype,
        ScoreOptions(0.1),
        reconstruction=reconstruction,
    )
    key = torch.zeros(64, kv_heads, rank_k, dtype=dtype)
    value = torch.zeros(64, kv_heads, rank_v, dtype=dtype)
    slots = torch.zeros(64, dtype=torch.int64)
    whole = torch.zeros(64, kv_heads, group * 128, dtype=dtype)
    bases = [torch.zeros(kv_heads, group * 128, rank, dtype=dtype) for rank in (rank_k, rank_v)]
    step = Step(
        torch.zeros(3, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, 2048, dtype=torch.int32),
        num_actual_tokens=64,
        max_query_len=1 if only_decode else None,
    )
    query = torch.zeros(64, heads, head_size or rank_k, dtype=dtype)
    output = torch.zeros(64, heads, rank_v, dtype=dtype)
    with compiling(90, loops=False) as found:
        kernels = GpuKernels()
        prepared = kernels.prepare(spec)
        if not only_decode:
            prepared.write_cache(key, value, cache, slots)
        projections = DownProjection(*bases), DownProjection(bases[0], None)
        for projection in () if only_decode else projections:
            values = value if projection.value is None else whole
            projecting = kernels.prepare(replace(spec, down_projection=projection))
            projecting.write_cache(whole, values, cache, slots)
        plan = kernels.plan(step, spec.plan_geometry(64))
        prepared.attend(query, cache, output, plan)
    return found


if __name__ == "__main__":
    print(json.dumps(_compile_all(), indent=1))
