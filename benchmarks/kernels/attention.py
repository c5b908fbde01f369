# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench attention`: our CPU kernels against vLLM's CPU_ATTN, call by call.

Each point of the grid (`attention_points.py`) runs both sides alternately in this process and
reports the median of the pairwise ratios, so that a busy machine slows both. Every output is
checked against float64. Beside the JSON lie a plot and a `.provenance.json` with the machine's
own limits and the fit of time against bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.checkpoint.modes import KeyMode

if TYPE_CHECKING:
    from vllm_eigen.benchmarks.kernels.attention_points import Point, Side

HELP = "time attention over latents against vLLM's CPU attention"
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--preset",
        choices=("quick", "coded", "full"),
        default="quick",
        help="which points (%(default)s)",
    )
    parser.add_argument(
        "--output-json", type=Path, metavar="FILE", help="write results, plot, provenance"
    )
    parser.add_argument(
        "--isa",
        choices=("best", "avx2"),
        default="best",
        help="instruction set of both sides (%(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=1.2, help="measuring time per point (default 1.2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; returns 1 if an output strays from float64."""
    if args.isa == "avx2":
        _limit_to_avx2()
    import torch
    from rich.console import Console

    from vllm_eigen.benchmarks.kernels.attention_points import TOLERANCE, coded, full, quick
    from vllm_eigen.benchmarks.lib.results import collect_provenance, write_json, write_text
    from vllm_eigen.kernels import load

    console = Console()
    kernels = load("cpu")
    threads = torch.get_num_threads()
    machine = {"threads": threads, **roofline()}
    console.print("machine: " + ", ".join(f"{k} {v}" for k, v in machine.items()))
    points = list({"quick": quick, "coded": coded, "full": full}[args.preset]())
    rows: list[Row] = []
    with console.status("measuring") as status:
        for i, point in enumerate(points):
            status.update(f"{i + 1}/{len(points)} {point}")
            rows.append(measure(kernels, point, args.seconds, args.seed))
    torch.set_num_threads(threads)
    console.print(table(rows))
    line = None if args.preset == "coded" else fit(rows)
    if line:
        parts = ", ".join(f"{k} {v}" for k, v in line.items())
        console.print("folded decode, one thread: " + parts)
    strays = [row for row in rows if row["relative_error"] > TOLERANCE[row["dtype"]]]
    for row in strays:
        console.print(f"[red]strays from float64: {row}")
    if args.output_json:
        record = {**collect_provenance(), "seed": args.seed, "kernels": kernels.name}
        record |= {"isa": getattr(kernels, "isa", None), "machine": machine, "fit": line}
        write_text(args.output_json, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        write_json(args.output_json.with_suffix(".provenance.json"), record)
        plot(rows, args.output_json.with_suffix(".png"))
        console.print(f"wrote {args.output_json.name}, its .png and .provenance.json")
    return 1 if strays else 0


def _limit_to_avx2() -> None:
    """Let this process run as on a processor without AVX-512; before torch is imported."""
    from vllm_eigen.kernels.cpu.build import ISA_VARIABLE

    os.environ |= {
        ISA_VARIABLE: "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
    import torch

    # By these vLLM chooses among the libraries and kernels that it brings.
    torch.cpu._is_avx512_supported = lambda: False
    torch.cpu._is_amx_tile_supported = lambda: False


def measure(kernels: Any, point: Point, seconds: float, seed: int) -> Row:
    """Both sides of one point, alternately, for about `seconds` seconds."""
    import torch

    from vllm_eigen.benchmarks.kernels.attention_points import eigen_side, vllm_side
    from vllm_eigen.benchmarks.lib.spread import Spread

    torch.set_num_threads(point.threads)
    generator = torch.Generator().manual_seed(seed)
    vllm, eigen = vllm_side(point, generator), eigen_side(kernels, point, generator)
    pairs = _alternate(vllm, eigen, seconds)
    speedup = Spread.quartiles([a / b for a, b in pairs["wall"]])
    vllm_ms, eigen_ms = (1e3 * statistics.median(side) for side in zip(*pairs["wall"], strict=True))
    return {
        "heads": point.heads,
        "kv_heads": point.kv_heads,
        "head_size": point.head_size,
        "rank_k": point.rank_k,
        "rank_v": point.rank_v,
        "codes": None if point.codes is None else [code.model_dump() for code in point.codes],
        "kv_ratio": round(point.kv_ratio, 3),
        "key_mode": point.key_mode,
        "phase": point.phase,
        "context": point.context,
        "batch": point.batch,
        "dtype": point.dtype,
        "threads": point.threads,
        "pairs": len(pairs["wall"]),
        "vllm_ms": round(vllm_ms, 4),
        "eigen_ms": round(eigen_ms, 4),
        "speedup": round(speedup.median, 3),
        "speedup_quartiles": [round(speedup.low, 3), round(speedup.high, 3)],
        "vllm_min_ms": round(1e3 * min(a for a, _ in pairs["wall"]), 4),
        "eigen_min_ms": round(1e3 * min(b for _, b in pairs["wall"]), 4),
        "eigen_cpu_ms": round(1e3 * min(b for _, b in pairs["cpu"]), 4),
        "speedup_cpu_time": round(statistics.median(a / b for a, b in pairs["cpu"]), 3),
        "bytes": point.cache_bytes,
        "bandwidth_gbs": round(point.cache_bytes / eigen_ms / 1e6, 2),
        "relative_error": eigen.relative_error(),
        "vllm_relative_error": vllm.relative_error(),
    }


def _alternate(vllm: Side, eigen: Side, seconds: float) -> dict[str, list[tuple[float, float]]]:
    """(vLLM, ours) seconds of each pair, by the clock and by the process's processor time."""
    pairs: dict[str, list[tuple[float, float]]] = {"wall": [], "cpu": []}
    vllm.call()
    eigen.call()
    deadline = time.perf_counter() + seconds
    while len(pairs["wall"]) < 3 or time.perf_counter() < deadline:
        first, second = _timed(vllm.call), _timed(eigen.call)
        pairs["wall"].append((first[0], second[0]))
        pairs["cpu"].append((first[1], second[1]))
    return pairs


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def roofline() -> dict[str, float]:
    """What one thread of this machine can do: GB/s copied and read, bf16 GFLOP/s multiplied."""
    import torch

    torch.set_num_threads(1)
    source = torch.ones(32 << 20)  # 128 MiB: past every cache
    target = torch.empty_like(source)
    a = torch.randn(1024, 1024).bfloat16()
    best = {
        name: min(_timed(call)[0] for _ in range(7))
        for name, call in (
            ("copy", lambda: target.copy_(source)),
            ("read", lambda: source.amax()),
            ("matmul", lambda: a @ a),
        )
    }
    size = source.nbytes / 1e9
    return {
        "copy_gbs": round(2 * size / best["copy"], 1),
        "read_gbs": round(size / best["read"], 1),
        "bf16_matmul_gflops": round(2 * 1024**3 / best["matmul"] / 1e9),
    }


def fit(rows: list[Row]) -> dict[str, float]:
    """Least squares of processor time = base + bytes / speed, over contexts and over ranks."""
    import numpy as np

    line = [
        row
        for row in rows
        if row["phase"] == "decode"
        and not row["key_mode"].has_rope
        and (row["heads"], row["batch"], row["threads"], row["dtype"]) == (8, 4, 1, "bf16")
    ]
    found: dict[str, float] = {}
    for name, chosen in (
        ("context", [r for r in line if (r["rank_k"], r["rank_v"]) == (77, 77)]),
        ("rank", [r for r in line if r["context"] == 4096 and r["rank_k"] == r["rank_v"]]),
    ):
        size = np.array([row["bytes"] for row in chosen], dtype=float)
        spent = np.array([row["eigen_cpu_ms"] for row in chosen])
        # Relative errors count: weigh by 1 / time.
        design = np.stack([np.ones_like(size), size], axis=1) / spent[:, None]
        base, slope = np.linalg.lstsq(design, np.ones_like(spent), rcond=None)[0]
        off = np.abs((base + slope * size) / spent - 1).max()
        found[f"{name}_base_ms"] = round(float(base), 4)
        found[f"{name}_gbs"] = round(1e-6 / float(slope), 2)
        found[f"{name}_off_percent"] = round(100 * float(off), 1)
    return found


def table(rows: list[Row]) -> Any:
    """A table for 80 columns."""
    from rich.table import Table

    result = Table(box=None, padding=(0, 1, 0, 0), title="ms a call; times faster, clock and CPU")
    for name in ("heads", "ranks", "keys", "phase", "tokens", "type", "th"):
        result.add_column(name)
    for name in ("vLLM", "ours", "x", "x cpu", "GB/s", "error"):
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(
            f"{row['heads']}/{row['kv_heads']}",
            f"{row['rank_k']}/{row['rank_v']}",
            row["key_mode"].removesuffix("-rope"),
            row["phase"].replace("prefill", "prompt"),
            f"{row['batch']}x{_short(row['context'])}",
            "codes" if row["codes"] else row["dtype"],
            str(row["threads"]),
            f"{row['vllm_ms']:.2f}",
            f"{row['eigen_ms']:.2f}",
            f"{row['speedup']:.2f}",
            f"{row['speedup_cpu_time']:.2f}",
            f"{row['bandwidth_gbs']:.0f}",
            f"{row['relative_error']:.0e}",
        )
    return result


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def plot(rows: list[Row], path: Path) -> None:
    """Speed-up by KV ratio, decode and prefill, one marker a key mode."""
    from vllm_eigen.benchmarks.lib import plots

    figure, axes = plots.pyplot().subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, phase in zip(axes, ("decode", "prefill"), strict=True):
        for marker, mode in (
            ("o", KeyMode.NO_ROPE),
            ("s", KeyMode.PRE_ROPE),
            ("^", KeyMode.POST_ROPE),
        ):
            for color, heads in (("tab:blue", 8), ("tab:orange", 32)):
                chosen = [
                    row
                    for row in rows
                    if (row["phase"], row["key_mode"], row["heads"]) == (phase, mode, heads)
                ]
                if chosen:
                    ratios = [row["kv_ratio"] for row in chosen]
                    speedups = [row["speedup"] for row in chosen]
                    label = f"{mode}, {heads} heads"
                    axis.scatter(ratios, speedups, c=color, marker=marker, s=18, label=label)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_title(phase)
        axis.set_xlabel("KV bytes, of the full head size")
        axis.legend(fontsize=7)
    axes[0].set_ylabel("times faster than vLLM's CPU_ATTN")
    axes[0].set_ylim(bottom=0)
    figure.tight_layout()
    plots.save(figure, path)
