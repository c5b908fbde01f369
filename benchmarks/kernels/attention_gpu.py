# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench attention-gpu`: our Triton kernels against vLLM's Triton attention, on one GPU.

Every output is checked against a dense float64 answer computed on the device. No result from a GPU
has been recorded yet.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

from vllm_eigen.checkpoint.modes import KeyMode

HELP = "time attention over latents against vLLM's Triton attention on a GPU"
COLUMNS = (
    *("heads", "kv_heads", "kv_ratio", "key_mode", "phase", "context", "batch"),
    *("vllm_ms", "eigen_ms", "speedup", "bandwidth_gbs", "relative_error"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    for kind in ("--output-json", "--output-markdown"):
        parser.add_argument(kind, type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--context", type=int, nargs="+", default=[32768], help="decoded contexts")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="sequences")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.6, 1.0], help="KV ratios")
    parser.add_argument("--prefill", type=int, default=2048, help="prompt tokens, 0 for none")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each side")
    parser.add_argument("--sweep", action="store_true", help="time other decode tiles too")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    import torch

    from vllm_eigen.benchmarks.kernels.gpu_points import GpuPoint, copy_gbs, measure, tunings
    from vllm_eigen.benchmarks.lib.results import collect_provenance, write_json, write_text
    from vllm_eigen.common.errors import KernelError

    torch.manual_seed(0)
    if not torch.cuda.is_available():
        raise KernelError("bench attention-gpu needs a CUDA device; see bench attention for CPUs")
    sizes, phases = [(32, 8), (32, 32)], [("decode", context) for context in args.context]
    phases += [("prefill", args.prefill)] if args.prefill else []
    copy = copy_gbs()
    lines = [f"Copy bandwidth: {copy} GB/s", "", f"| {' | '.join(COLUMNS)} |"]
    lines.append("|---" * len(COLUMNS) + "|")
    print("\n".join(lines))
    rows = []
    modes = KeyMode.NO_ROPE, KeyMode.PRE_ROPE
    for (heads, kv_heads), (phase, context), batch, ratio, mode in product(
        sizes, phases, args.batch, args.ratio, modes
    ):
        point = GpuPoint(heads, kv_heads, 128, ratio, mode, phase, context, batch)
        for tuning in tunings(args.sweep and phase == "decode"):
            rows.append(measure(point, tuning, "cuda", args.repeats) | {"copy_gbs": copy})
            cells = (rows[-1][name] for name in COLUMNS)
            texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
            lines.append(f"| {' | '.join(texts)} |")
            print(lines[-1], flush=True)
    if args.output_json:
        made = collect_provenance() | {"device": torch.cuda.get_device_name()}
        write_json(args.output_json, {"provenance": made, "rows": rows})
    if args.output_markdown:
        write_text(args.output_markdown, "\n".join(lines) + "\n")
    return 0
