# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench gpu`: all that can be said of the Triton kernels on one GPU, in one run.

It needs torch and Triton; baselines, compute-sanitizer and vLLM's engine are measured where they
are installed, and what is not there is said. Written are a JSON, a table and a plot.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_eigen.benchmarks.kernels.gpu.points import GpuPoint

HELP = "check and time the Triton kernels on this GPU: float64, graphs, baselines, the engine"
STAGES = ("correctness", "timing", "sanitizer", "engine")
MINUTES = 14
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--only",
        nargs="+",
        choices=STAGES,
        default=STAGES,
        metavar="STAGE",
        help=f"some of {', '.join(STAGES)} (all)",
    )
    parser.add_argument("--quick", action="store_true", help="a few small points")
    parser.add_argument("--sweep", action="store_true", help="time other decode tiles too")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="begin nothing after these (%(default)s)"
    )
    parser.add_argument(
        "--output-json", type=Path, metavar="FILE", help="write results; table and plot beside it"
    )


def run(args: argparse.Namespace) -> int:
    """Run the stages; 1 if a kernel is wrong.

    Raises:
        KernelError: there is no GPU.
    """
    from vllm_eigen.common.errors import KernelError

    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        raise KernelError(f"bench gpu needs PyTorch and Triton: {error}") from error
    if not torch.cuda.is_available():
        raise KernelError(
            "bench gpu needs an NVIDIA GPU and finds none; bench attention measures CPUs"
        )
    from vllm_eigen.benchmarks.kernels.gpu import grid, report

    deadline = time.monotonic() + 60 * args.minutes
    result = measure_all(
        args.only,
        device="cuda",
        checked=list(grid.checked(args.quick)),
        timed=list(grid.timed(args.quick)),
        repeats=args.repeats,
        sweep=args.sweep,
        deadline=deadline,
    )
    print("\n".join(report.tables(result)))
    if args.output_json:
        report.write(args.output_json, result)
    return 0 if report.is_right(result) else 1


def measure_all(
    stages: Iterable[str],
    *,
    device: str,
    checked: list[GpuPoint],
    timed: list[GpuPoint],
    repeats: int,
    sweep: bool,
    deadline: float,
) -> Row:
    """The document of one run. A stage that begins after the deadline is listed as left out.

    Args:
        checked, timed: points of correctness and of timing.
        deadline: by `time.monotonic`.
    """
    import torch

    from vllm_eigen.benchmarks.kernels.gpu import engine, sanitizer
    from vllm_eigen.benchmarks.kernels.gpu.measure import check, copy_gbs, measure, tunings
    from vllm_eigen.benchmarks.lib.results import collect_provenance

    torch.manual_seed(0)
    result: Row = {"provenance": collect_provenance() | {"device": _device(device)}}
    left_out: list[str] = []

    def in_time(what: str) -> bool:
        if time.monotonic() < deadline:
            return True
        left_out.append(f"{what}: no time left")
        return False

    def each(stage: str, points: list[GpuPoint], call: Callable[[GpuPoint], list[Row]]) -> None:
        rows: list[Row] = []
        for number, point in enumerate(points, start=1):
            if not in_time(f"{stage} {point}"):
                continue
            if not _fits(point, device):
                left_out.append(f"{stage} {point}: not enough memory")
                continue
            print(f"{stage} {number}/{len(points)} {point}", flush=True)
            rows += call(point)
        result[stage] = rows

    for stage in stages:
        if stage == "correctness":
            each(stage, checked, lambda point: [check(point, device)])
        elif stage == "timing":
            result["copy_gbs"] = copy_gbs(device) if device == "cuda" else None
            each(
                stage,
                timed,
                lambda point: [
                    measure(point, tuning, device, repeats)
                    for tuning in tunings(sweep and point.phase == "decode")
                ],
            )
        elif in_time(stage):
            print(stage, flush=True)
            limit = max(1.0, deadline - time.monotonic())
            result[stage] = sanitizer.run(limit) if stage == "sanitizer" else engine.run(limit)
    return result | {"left_out": left_out}


def _fits(point: GpuPoint, device: str) -> bool:
    import torch

    from vllm_eigen.benchmarks.kernels.gpu.measure import needed_bytes

    if device != "cuda":
        return True
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return needed_bytes(point) < 0.8 * free


def _device(device: str) -> Row:
    """What the GPU says of itself."""
    import torch

    if device != "cuda":
        return {"name": device}
    found: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "cuda": torch.version.cuda,
    }
