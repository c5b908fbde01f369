"""Attention on one GPU: our Triton kernels against vLLM's Triton unified attention at full rank.

    python3 benchmarks/attention_gpu.py --json results.json --markdown results.md [--sweep]

Needs torch and triton, and for the baseline an importable vLLM (`--vllm DIR` adds a folder to the
path); without one the baseline column stays empty. Every output is checked against a dense float64
answer computed on the device. Baseline and ours run alternately, as CUDA graphs where that works.

Written on a machine without a GPU, where only `--smoke` was run (TRITON_INTERPRET=1: tiny inputs,
no baseline, times that mean nothing). Nobody has seen a number of it from a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vllm_eigen.kernels import Rebuild, ScoreOptions
from vllm_eigen.kernels.gpu import GpuKernels
from vllm_eigen.kernels.triton_tiles import Tile, Tuning

PAGE = 16
EVENT: Any = torch.cuda.Event


@dataclass(frozen=True)
class Point:
    """One row of the table. Lengths in tokens."""

    heads: int
    kv_heads: int
    head_size: int
    kv_ratio: float
    key_mode: str
    phase: str
    context: int
    batch: int

    @property
    def ranks(self) -> tuple[int, int]:
        """rank_k, rank_v whose rows start on 16 bytes; keys give way to values, as they can."""
        if self.kv_ratio == 1.0:
            return self.head_size, self.head_size
        rank_k = int(self.kv_ratio * self.head_size) // 16 * 16
        return rank_k, int(2 * self.kv_ratio * self.head_size - rank_k) // 8 * 8


def make(point: Point, device: str) -> SimpleNamespace:
    """Random latents on shuffled pages: what `Kernels.attend` takes, in its order."""
    rank_k, rank_v = point.ranks
    queries = 1 if point.phase == "decode" else point.context
    pages = point.batch * point.context // PAGE
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    rebuild, query_size = None, rank_k
    if point.key_mode == "pre-rope":
        query_size = point.head_size
        rates = 10000.0 ** -torch.linspace(0, 1, query_size // 2 + 1, device=device)[:-1]
        angles = torch.arange(point.context, device=device)[:, None] * rates
        basis = torch.randn(point.kv_heads, rank_k, query_size, **options) / rank_k**0.5
        table = torch.cat([angles.cos(), angles.sin()], dim=1)
        rebuild = Rebuild(basis, table, query_size)
    tokens = point.batch * queries
    return SimpleNamespace(
        query=torch.randn(tokens, point.heads, query_size, **options),
        cache=torch.randn(pages, point.kv_heads, PAGE, rank_k + rank_v, **options),
        output=torch.full((tokens, point.heads, rank_v), float("nan"), **options),
        query_start_loc=torch.arange(point.batch + 1, dtype=torch.int32, device=device) * queries,
        seq_lens=torch.full((point.batch,), point.context, dtype=torch.int32, device=device),
        block_table=torch.randperm(pages, device=device).int().view(point.batch, -1),
        options=ScoreOptions(point.head_size**-0.5),
        rebuild=rebuild,
    )


def relative_error(point: Point, inputs: SimpleNamespace) -> float:
    """Of the first and last rows of the last sequence, all heads, against float64."""
    rank_k, _ = point.ranks
    last = point.batch - 1
    tokens = inputs.cache[inputs.block_table[last].long()].double()
    latents = tokens.transpose(0, 1).flatten(1, 2)
    start, end = (int(inputs.query_start_loc[i]) for i in (last, last + 1))
    found, wanted = [], []
    for row in {start, end - 1}:
        seen = point.context - (end - 1 - row)
        for head in range(point.heads):
            kv_head = head // (point.heads // point.kv_heads)
            keys, values = latents[kv_head, :seen, :rank_k], latents[kv_head, :seen, rank_k:]
            if inputs.rebuild is not None:
                keys = keys @ inputs.rebuild.key_basis[kv_head].double()
                x, y = keys.chunk(2, dim=-1)
                cos, sin = inputs.rebuild.cos_sin[:seen].double().chunk(2, dim=-1)
                keys = torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)
            logits = keys @ inputs.query[row, head].double() * inputs.options.scale
            wanted.append(torch.softmax(logits, 0) @ values)
            found.append(inputs.output[row, head].double())
    difference = torch.stack(found) - torch.stack(wanted)
    return float(difference.norm() / torch.stack(wanted).norm())


def vllm_call(point: Point, device: str) -> Callable[[], object] | None:
    """vLLM's Triton unified attention at full rank, with its split-KV buffers; None without it."""
    try:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except ImportError:
        return None
    full = make(replace(point, kv_ratio=1.0, key_mode="folded"), device)
    size, segments, threshold = point.head_size, 16, 128 // point.kv_heads
    rows = (max(threshold, 1), point.heads, segments)
    scratch = [torch.empty(s, device=device) for s in ((*rows, size), rows, rows)]
    # vLLM's own layout: keys and values apart, [pages, page, kv_heads, head_size].
    keys, values = full.cache.view(2, -1, PAGE, point.kv_heads, size)
    options: dict[str, Any] = dict.fromkeys(("q_descale", "k_descale", "v_descale"))
    options |= {"q": full.query, "k": keys, "v": values, "out": full.output, "causal": True}
    options |= {"cu_seqlens_q": full.query_start_loc, "seqused_k": full.seq_lens}
    options |= {"max_seqlen_q": full.query.shape[0] // point.batch, "max_seqlen_k": point.context}
    options |= {"softmax_scale": full.options.scale, "window_size": (-1, -1), "softcap": 0}
    options |= {"softmax_segm_output": scratch[0], "softmax_segm_max": scratch[1]}
    options |= {"softmax_segm_expsum": scratch[2], "num_par_softmax_segments": segments}
    options |= {"block_table": full.block_table, "seq_threshold_3D": threshold}
    return partial(unified_attention, **options)


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph replay, once warm."""
    if not torch.cuda.is_available():
        return call
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def milliseconds(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Medians of the calls, run in turn; on a GPU by events around each."""

    def once(call: Callable[[], object]) -> float:
        if not torch.cuda.is_available():
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        start, end = (EVENT(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    rounds = [[once(call) for call in calls] for _ in range(repeats)]
    return [float(statistics.median(taken)) for taken in zip(*rounds, strict=True)]


def copy_gbs() -> float:
    """Device-to-device copy, bytes read plus bytes written."""
    source, target = torch.randn(2, 2**29, device="cuda")
    taken = milliseconds([graphed(lambda: target.copy_(source))], 20)
    return float(2 * source.nbytes / taken[0] / 1e6)


def tunings(sweep: bool) -> list[Tuning]:
    """The default, or the decode tiles worth trying."""
    if not sweep:
        return [Tuning()]
    swapped = [(64, 4, 3), (64, 4, 5), (128, 4, 3), (128, 8, 3)]
    tiles = [Tile(16, *shape, swap=True) for shape in swapped]
    tiles += [Tile(16, *shape, swap=False) for shape in [(64, 1, 3), (32, 1, 5), (64, 4, 3)]]
    return [Tuning(t, t, relative_rotation=r) for t, r in product(tiles, (True, False))]


def measure(point: Point, tuning: Tuning, device: str, repeats: int) -> dict[str, Any]:
    """One row: checked, then timed beside the baseline."""
    inputs = make(point, device)
    kernels, fields = GpuKernels(tuning), list(vars(inputs).values())
    ours = partial(kernels.attend, *fields, max_query_len=inputs.query.shape[0] // point.batch)
    ours()
    error = relative_error(point, inputs)
    baseline = vllm_call(point, device) if device == "cuda" else None
    calls = [graphed(call) for call in (ours, baseline) if call is not None]
    times = milliseconds(calls, repeats)
    theirs = times[1] if len(times) > 1 else None
    read = inputs.cache.nbytes + inputs.query.nbytes + inputs.output.nbytes
    row = asdict(point) | {"dtype": "bfloat16", "threads": 0, "bytes": read, "ranks": point.ranks}
    row |= {"vllm_ms": theirs, "eigen_ms": times[0], "speedup": theirs and theirs / times[0]}
    row |= {"bandwidth_gbs": read / times[0] / 1e6, "relative_error": error}
    return row | {"tuning": asdict(tuning)}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for kind in ("--json", "--markdown"):
        parser.add_argument(kind, type=Path, help="write the result here")
    parser.add_argument("--vllm", default=".", help="folder that holds the vllm package")
    parser.add_argument("--context", type=int, nargs="+", default=[32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.6, 1.0])
    parser.add_argument("--prefill", type=int, default=2048, help="prompt tokens, 0 for none")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sweep", action="store_true", help="time other decode tiles too")
    parser.add_argument("--smoke", action="store_true", help="tiny inputs, to see that it runs")
    options = parser.parse_args()
    sys.path.insert(0, options.vllm)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, phases = [(32, 8), (32, 32)], [("decode", c) for c in options.context]
    phases += [("prefill", options.prefill)] if options.prefill else []
    if options.smoke:
        sizes, phases = [(4, 2)], [("decode", 128), ("prefill", 32)]
        options.batch, options.repeats = [2], 1
    copy = copy_gbs() if device == "cuda" else None
    names = ["heads", "kv_heads", "kv_ratio", "key_mode", "phase", "context", "batch"]
    names += ["vllm_ms", "eigen_ms", "speedup", "bandwidth_gbs", "relative_error"]
    lines = [f"Copy bandwidth: {copy} GB/s", "", f"| {' | '.join(names)} |", "|---" * 12 + "|"]
    print("\n".join(lines))
    rows = []
    grid = product(sizes, phases, options.batch, options.ratio, ("folded", "pre-rope"))
    for (heads, kv_heads), (phase, context), batch, ratio, mode in grid:
        point = Point(heads, kv_heads, 128, ratio, mode, phase, context, batch)
        for tuning in tunings(options.sweep and phase == "decode"):
            rows.append(measure(point, tuning, device, options.repeats) | {"copy_gbs": copy})
            cells = (rows[-1][n] for n in names)
            texts = (f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)
            lines.append(f"| {' | '.join(texts)} |")
            print(lines[-1], flush=True)
    if options.json:
        gpu = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
        provenance = {"command": sys.argv, "torch": torch.__version__, "device": gpu}
        options.json.write_text(json.dumps({"provenance": provenance, "rows": rows}, indent=1))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
