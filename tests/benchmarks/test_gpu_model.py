# SPDX-License-Identifier: Apache-2.0
"""The bandwidth model: what bounds a kernel, and that its numbers are those of the code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_eigen.benchmarks.kernels.gpu.bandwidth import (
    H100,
    Geometry,
    Work,
    decode_work,
    full_milliseconds,
    predict,
    prefill_work,
    residents,
)
from vllm_eigen.benchmarks.kernels.gpu.compiled import CompiledKernel, longest_loop
from vllm_eigen.benchmarks.kernels.gpu.points import GpuPoint, cached_bytes
from vllm_eigen.checkpoint.modes import KeyMode

KERNEL = CompiledKernel(
    name="decode",
    hash="",
    threads=128,
    registers=128,
    stack_bytes=0,
    shared_bytes=50_000,
    wgmma=8,
    mma=0,
    copies=8,
    wide_copies=8,
    middling_copies=0,
    loop_instructions=500,
    block_m=16,
    block_n=64,
)
POINT = GpuPoint(32, 8, 128, KeyMode.NO_ROPE, "decode", 32_768, 32, 16, 0.6)
LAUNCHED = Geometry(
    numbers_k=64,
    numbers_v=80,
    columns=0,
    heads_per_tile=4,
    bases_per_tile=1,
    block_m=16,
    block_n=64,
    stages=1,
    split_size=512,
    partial_width=80,
)


@pytest.mark.parametrize(
    ("changes", "programs"),
    [
        ({}, 4),  # 65,536 / (128 registers x 128 threads), and 228 KiB / 50 KB
        ({"registers": 255}, 2),
        ({"registers": 129}, 3),
        ({"shared_bytes": 120_000}, 1),
        ({"registers": 32, "shared_bytes": 0}, 16),  # 2,048 threads
    ],
)
def test_residents(changes: dict[str, int], programs: int) -> None:
    assert residents(replace(KERNEL, **changes)) == programs


def test_memory_bounds_a_kernel_with_much_in_flight() -> None:
    work = Work(programs=10_000, num_bytes=3.35e9, operations=1.0, in_flight=32_768, passes=0)
    found = predict(KERNEL, work)
    assert found.bound == "memory"
    assert found.milliseconds == pytest.approx(1.0 / 0.92, rel=0.01)


def test_latency_bounds_few_programs() -> None:
    work = Work(programs=8, num_bytes=1e8, operations=1.0, in_flight=8192, passes=0)
    found = predict(KERNEL, work)
    assert found.bound == "latency"
    assert found.milliseconds == pytest.approx(1e8 * 650e-9 / (8 * 8192) * 1e3, rel=0.01)


def test_a_wave_that_does_not_fill_the_gpu_counts_whole() -> None:
    slots = 4 * H100.multiprocessors
    full = Work(programs=slots, num_bytes=1.0, operations=1e12, in_flight=8192, passes=0)
    found = predict(KERNEL, full)
    assert found.bound == "matrix units"
    assert found.milliseconds == pytest.approx(1e3 * (1e12 / 989e12 + 2.5e-6), rel=0.01)
    more = replace(full, programs=slots + 1, operations=1e12 * (slots + 1) / slots)
    assert predict(KERNEL, more).milliseconds == pytest.approx(2 * found.milliseconds, rel=0.01)
    assert predict(replace(KERNEL, wgmma=0), full).milliseconds > 1.5 * found.milliseconds


def test_many_instructions_bound_a_kernel() -> None:
    slots = 4 * H100.multiprocessors
    work = Work(programs=slots, num_bytes=1.0, operations=1.0, in_flight=8192, passes=1e6)
    found = predict(KERNEL, work)
    assert found.bound == "issue"
    assert found.milliseconds == pytest.approx(1e9 * 500 * 4 / (528 * 1.755e9), rel=0.01)


def test_the_longest_loop_is_found() -> None:
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, [R4] ;
        /*0020*/              @!P0 BRA 0x10 ;
        /*0030*/                   FADD R2, R2, R3 ;
        /*0040*/              @P1 BRA 0x60 ;
        /*0050*/              @!P1 BRA.U 0x0 ;
        /*0060*/                   EXIT ;
    """
    assert longest_loop(listing) == 6
    assert longest_loop("") == 0


def test_decode_reads_the_cache_once() -> None:
    work = decode_work(POINT, LAUNCHED)
    assert work.programs == 32 * 8 * 64
    partials = 4 * 32 * 32 * 64 * 82
    assert work.num_bytes == cached_bytes(POINT) + partials + 2 * 32 * 32 * 144
    assert work.operations == 32 * 8 * 32_768 * 2 * 16 * (64 + 80)
    assert work.in_flight == 64 * 2 * 144
    assert work.passes == 32 * 8 * 32_768 / 64
    one = decode_work(replace(POINT, context=512), LAUNCHED)
    assert one.num_bytes == cached_bytes(POINT) / 64 + 2 * 32 * 32 * 144


def test_reconstruction_counts_its_product() -> None:
    reconstructed = replace(LAUNCHED, columns=128, bases_per_tile=4)
    more = decode_work(POINT, reconstructed).operations - decode_work(POINT, LAUNCHED).operations
    assert more == 32 * 8 * 32_768 * 2 * (4 * 64 * 128 + 16 * (4 * 128 - 64))


def test_a_prompt_multiplies_half_of_the_square() -> None:
    point = replace(POINT, phase="prefill", context=2048, batch=4)
    launched = replace(LAUNCHED, heads_per_tile=4, block_m=128)
    whole = 4 * 8 * 2048 * (2048 / 32) * 2 * 128 * (64 + 80)
    assert prefill_work(point, launched).operations == pytest.approx(whole / 2, rel=0.02)
    square = 4 * 32 * 128 * 4 * 2048 * 2048 / 2
    assert full_milliseconds(point) == pytest.approx(1e3 * square / (0.75 * 989e12), rel=0.02)


def test_the_committed_prediction_is_of_this_model() -> None:
    """What is committed follows from the numbers of the code that stand beside it."""
    root = Path(__file__).parents[2]
    document = json.loads(
        (root / "benchmarks/results/kernels/gpu/gpu-model-h100.json").read_text(encoding="utf-8")
    )
    assert len(document["rows"]) == 32
    for row in document["rows"]:
        kernel, work = CompiledKernel(**row["kernel"]), Work(**row["work"])
        found = predict(kernel, work)
        assert found.milliseconds == pytest.approx(row["prediction"]["milliseconds"])
        assert found.bound == row["prediction"]["bound"]


def test_the_committed_prediction_meets_what_is_asked_of_decode() -> None:
    """Long contexts against full heads of bfloat16; and no decode spills."""
    root = Path(__file__).parents[2]
    path = root / "benchmarks/results/kernels/gpu/gpu-model-h100.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    decodes = [row for row in rows if row["phase"] == "decode"]
    assert all(row["kernel"]["stack_bytes"] == 0 for row in decodes)
    speedups = {
        row["bits"]: row["speedup"]
        for row in decodes
        if row["key_mode"] == KeyMode.NO_ROPE and (row["context"], row["batch"]) == (32_768, 32)
    }
    assert speedups[16] >= 1.4
    assert speedups[4] >= 2.2
