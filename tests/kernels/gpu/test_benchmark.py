# SPDX-License-Identifier: Apache-2.0
"""All of `bench gpu` that runs here: on a GPU, or small and interpreted on the CPU."""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path

import pytest

from tests.kernels.gpu.moving import HAS_GPU, RUNS_HERE, needs_kernels, run_interpreted
from vllm_eigen.benchmarks.kernels.gpu import command, report, sanitizer
from vllm_eigen.benchmarks.kernels.gpu.grid import CACHES, MODES
from vllm_eigen.benchmarks.kernels.gpu.points import GpuPoint
from vllm_eigen.checkpoint.modes import KeyMode

pytest.importorskip("triton")

if RUNS_HERE:
    from vllm_eigen.benchmarks.kernels.gpu.measure import check, measure, prepare, relative_error
    from vllm_eigen.kernels.gpu.tiles import Tuning

DEVICE = "cuda" if HAS_GPU else "cpu"
POINTS = [(mode, *cache) for mode, cache in product(MODES, CACHES)]


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
@pytest.mark.slow
def test_without_a_gpu() -> None:
    run_interpreted(__file__)


@needs_kernels
@pytest.mark.parametrize(
    ("mode", "bits", "ratio", "phase", "context"),
    # On a GPU all; interpreted, each kernel, cache and key mode once.
    [(*one, *step) for one in POINTS for step in (("decode", 700), ("prefill", 70))]
    if HAS_GPU
    else [(*one, "decode", 70) for one in POINTS[::3]]
    + [(*one, "prefill", 20) for one in POINTS[1::3]],
)
def test_every_kernel_is_right(
    mode: KeyMode, bits: int, ratio: float, phase: str, context: int
) -> None:
    row = check(GpuPoint(2, 1, 64, mode, phase, context, 2, bits, ratio), DEVICE)
    assert row["agrees"], row
    assert row.get("replays", True), row


@needs_kernels
def test_a_wrong_result_is_seen() -> None:
    point = GpuPoint(4, 2, 64, KeyMode.NO_ROPE, "decode", 70, 2)
    inputs, attend = prepare(point, Tuning(), DEVICE)
    attend()
    assert relative_error(point, inputs) < 1e-2
    inputs.output[-1, 1, 3] += 1.0
    assert relative_error(point, inputs) > 0.05


@needs_kernels
def test_times_beside_the_baselines_that_there_are() -> None:
    row = measure(GpuPoint(4, 2, 64, KeyMode.NO_ROPE, "decode", 128, 2), Tuning(), DEVICE, 1)
    assert {"eigen", "torch_sdpa"} <= set(row["milliseconds"])
    assert set(row["milliseconds"]) | set(row["missing"]) == {
        *("eigen", "torch_sdpa", "flash_attn", "vllm_flash_attn"),
        *("triton_attn", "triton_attn_diffkv"),
    }


@needs_kernels
def test_a_run_writes_json_table_and_plot(tmp_path: Path) -> None:
    points = [GpuPoint(2, 1, 64, KeyMode.NO_ROPE, "decode", 70, 2, bits) for bits in (16, 4)]
    result = command.measure_all(
        ("correctness", "timing", "sanitizer"),
        device=DEVICE,
        checked=points,
        timed=points,
        repeats=1,
        sweep=False,
        deadline=time.monotonic() + 300,
    )
    assert report.is_right(result)
    assert len(result["correctness"]) == len(result["timing"]) == 2
    assert result["left_out"] == []
    output = tmp_path / "gpu.json"
    report.write(output, result)
    assert json.loads(output.read_text())["timing"] == result["timing"]
    table = output.with_suffix(".md").read_text()
    assert "| 4 bits 60/64, no-rope | 2/1 | decode 2 x 70 |" in table
    assert "WRONG" not in table
    assert output.with_suffix(".png").stat().st_size > 1000
    late = command.measure_all(
        ("correctness", "engine"),
        device=DEVICE,
        checked=points,
        timed=[],
        repeats=1,
        sweep=False,
        deadline=time.monotonic() - 1,
    )
    assert late["correctness"] == []
    assert len(late["left_out"]) == 3


@needs_kernels
def test_what_runs_below_the_sanitizer() -> None:
    sanitizer.main(DEVICE, longest=700 if HAS_GPU else 100, most=None if HAS_GPU else 2)
