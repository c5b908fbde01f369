# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels over codes compiled for Ampere and Hopper, which needs no GPU.

Decode must read every code in loads of 16 bytes and keep all it holds in registers. Run as a
script with a compute capability it prints what the compiler made of each kernel.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
import torch

from tests.kernels.gpu.compiling import Reports, reports
from vllm_eigen.checkpoint.codes import Code

SHARED_BYTES = {80: 166_912, 90: 232_448}
MIXED = {
    64: Code(eight=4, four=48, two=16),
    128: Code(eight=8, four=96, two=16),
    256: Code(eight=16, four=208, two=32),
}
# name: heads, KV heads, head size, key code, value code, whether keys are reconstructed, block size
CASES: dict[str, tuple[Any, ...]] = {
    **{
        f"{size}": (32, 8, size, code, Code(four=size, token_scale=True), False, 64)
        for size, code in MIXED.items()
    },
    "128, other counts": (
        *(32, 8, 128, Code(eight=12, four=88, two=32, token_scale=False)),
        *(Code(eight=8, four=104, token_scale=True), False, 64),
    ),
    "128, blocks of 16": (32, 8, 128, MIXED[128], Code(four=128, token_scale=True), False, 16),
    "pre-rope 64": (32, 8, 64, MIXED[64], Code(four=64, token_scale=True), True, 64),
    "pre-rope 128": (
        *(32, 8, 128, Code(eight=8, four=96), Code(four=128, token_scale=True), True, 64),
    ),
    # Heads as of Gemma 3: the basis of keys takes most of the shared memory.
    "pre-rope 256": (*(4, 1, 256, MIXED[256]), Code(four=256, token_scale=True), True, 64),
}

_TWO_BITS = {
    size: (
        Code(eight=size // 16, four=size // 4, two=size // 2),
        Code(four=size // 4, two=3 * size // 4, token_scale=True),
    )
    for size in (64, 128, 256)
}
# Codes of about 2 bits a direction, and 4 bits with some of 2, compiled for decode alone.
DECODED: dict[str, tuple[Any, ...]] = {
    **{f"{size}, 2 bits": (32, 8, size, *_TWO_BITS[size], False, 64) for size in _TWO_BITS},
    **{f"pre-rope {size}, 2 bits": (32, 8, size, *_TWO_BITS[size], True, 64) for size in (64, 128)},
    "pre-rope 128, mixed": (*(32, 8, 128, MIXED[128], Code(four=128, token_scale=True), True, 64),),
}
AMPERE = ("64", "128", "128, blocks of 16", "pre-rope 64", "pre-rope 128")
"""What is compiled for capability 8.0 as well."""
COMPILED = [*((90, name) for name in CASES), *((80, name) for name in AMPERE)]
SPILLED = {(80, "pre-rope 128"): 56}
"""Bytes of a thread in decode, at most; all else spills nothing."""
COUNTED = ("64", "128", "256")
"""Whose instructions are counted, for capability 9.0."""
UNPACKED = 2.3
"""Instructions of a warp's loop over keys that one number of a code may take, at most."""


@cache
def compiled(capability: int) -> Reports:
    pytest.importorskip("triton.backends.nvidia.compiler")
    return reports("tests.kernels.gpu.test_compile_coded", str(capability))


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "name"), COMPILED)
def test_fits_the_device_and_spills_nothing(capability: int, name: str) -> None:
    kernels = compiled(capability)[name]
    assert [k["name"] for k in kernels] == ["write", "decode", "prefill"]
    assert all(k["shared_bytes"] <= SHARED_BYTES[capability] for k in kernels), kernels
    product = "wgmma" if capability == 90 else "mma"
    assert all(k[product] > 0 for k in kernels[1:]), kernels
    assert kernels[1]["stack_bytes"] <= SPILLED.get((capability, name), 0), kernels[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODED)
def test_decode_of_many_planes_spills_nothing(name: str) -> None:
    [decode] = compiled(90)[name]
    assert decode["stack_bytes"] == 0, decode
    assert decode["wide_copies"] > 0
    assert decode["wgmma"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "name"), COMPILED)
def test_decode_loads_codes_in_16_bytes(capability: int, name: str) -> None:
    """Copies of 16 bytes are those of the tiles before the loop and of one in it, no more."""
    decode, tiles, reconstructs = _decode_of(capability, name)
    copies = [
        max(1, 2 * tile.units * decode["block_n"] // (16 * decode["threads"])) for tile in tiles
    ]
    basis = decode["wide_copies"] - (2 if reconstructs else 3) * sum(copies)
    assert basis >= 0, (decode, copies)
    # Start angles of a tile are copied as well where keys are reconstructed.
    assert basis == 0 or "pre-rope" in name, (decode, copies)


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_codes_are_unpacked_in_few_instructions(name: str) -> None:
    """All else in the loop is about 400 instructions (`test_compile.py` counts it for numbers)."""
    decode, tiles, _ = _decode_of(90, name)
    numbers = sum(tile.units * tile.planes for tile in tiles)
    of_a_lane = numbers * decode["block_n"] / decode["threads"]
    assert decode["loop_instructions"] < 400 + UNPACKED * of_a_lane, decode


def _decode_of(capability: int, name: str) -> tuple[dict[str, Any], tuple[Any, ...], bool]:
    """A compiled decode, the tiles of codes that it reads, and whether it reconstructs keys."""
    from vllm_eigen.kernels.gpu.coded.layer import key_tiles, value_tiles
    from vllm_eigen.kernels.gpu.padding import padding_of
    from vllm_eigen.kernels.interface import Latents

    _, decode, _ = compiled(capability)[name]
    *_, key_code, value_code, reconstructs, _ = CASES[name]
    padding = padding_of(Latents(key_code.rank, value_code.rank, key_code, value_code))
    return decode, (*key_tiles(padding), *value_tiles(padding)), reconstructs


@pytest.mark.slow
def test_counts_are_arguments() -> None:
    """Layers whose widths fill the same tiles run the same compiled kernels."""
    found = compiled(90)
    hashes = [[kernel["hash"] for kernel in found[n]] for n in ("128", "128, other counts")]
    assert hashes[0] == hashes[1]


def _compile_all(capability: int) -> Reports:
    """Call the kernels with a compiler in place of the launcher."""
    names = AMPERE if capability == 80 else tuple(CASES)
    made = {
        name: _compile(CASES[name], capability, loops=capability == 90 and name in COUNTED)
        for name in names
    }
    if capability == 90:
        made |= {
            name: _compile(case, capability, only_decode=True) for name, case in DECODED.items()
        }
    return {name: [asdict(kernel) for kernel in found] for name, found in made.items()}


def _compile(
    case: tuple[Any, ...], capability: int, *, only_decode: bool = False, loops: bool = False
) -> list[Any]:
    from vllm_eigen.benchmarks.kernels.gpu.compiled import compiling
    from vllm_eigen.kernels import KeyReconstruction, LayerSpec, RotaryTable, ScoreOptions, Step
    from vllm_eigen.kernels.gpu.kernels import GpuKernels

    heads, kv_heads, size, key_code, value_code, reconstructs, block_size = case
    dtype = torch.bfloat16
    reconstruction = None
    if reconstructs:
        rotary = RotaryTable.from_frequencies(torch.rand(size // 2), 256)
        basis = torch.zeros(kv_heads, key_code.rank, size, dtype=dtype)
        reconstruction = KeyReconstruction(basis, rotary)
    spec = LayerSpec(
        *(heads, kv_heads, key_code.rank, value_code.rank, dtype, torch.uint8),
        ScoreOptions(0.1),
        reconstruction=reconstruction,
        key_code=key_code,
        value_code=value_code,
    )
    width = spec.key_width + spec.value_width
    cache = torch.zeros(4, kv_heads, block_size, width, dtype=torch.uint8)
    key = torch.zeros(64, kv_heads, spec.rank_k, dtype=dtype)
    value = torch.zeros(64, kv_heads, spec.rank_v, dtype=dtype)
    step = Step(
        torch.zeros(3, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, 2048, dtype=torch.int32),
        num_actual_tokens=64,
        max_query_len=1 if only_decode else None,
    )
    query = torch.zeros(64, heads, spec.query_size, dtype=dtype)
    output = torch.zeros(64, heads, spec.rank_v, dtype=dtype)
    with compiling(capability, loops=loops) as found:
        kernels = GpuKernels()
        prepared = kernels.prepare(spec)
        if not only_decode:
            prepared.write_cache(key, value, cache, torch.zeros(64, dtype=torch.int64))
        plan = kernels.plan(step, spec.plan_geometry(block_size))
        prepared.attend(query, cache, output, plan)
    return [kernel for kernel in found if kernel.name != "combine"]


if __name__ == "__main__":
    print(json.dumps(_compile_all(int(sys.argv[1])), indent=1))
