# SPDX-License-Identifier: Apache-2.0
"""What the GPU attention benchmark measures: points, their inputs, and one timed call of each side.

Baseline and ours run alternately, as CUDA graphs where there is a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.kernels import KeyReconstruction, LayerSpec, RotaryTable, ScoreOptions, Step
from vllm_eigen.kernels.gpu.kernels import GpuKernels
from vllm_eigen.kernels.gpu.tiles import Tile, Tuning

BLOCK_SIZE = 16
EVENT: Any = torch.cuda.Event


@dataclass(frozen=True)
class GpuPoint:
    """One row of the table. Lengths in tokens."""

    heads: int
    kv_heads: int
    head_size: int
    kv_ratio: float
    key_mode: KeyMode
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


@dataclass(frozen=True, eq=False)
class Inputs:
    """One point's layer, cache and step, on the device."""

    layer: LayerSpec
    step: Step
    query: torch.Tensor
    cache: torch.Tensor
    output: torch.Tensor


def make(point: GpuPoint, device: str) -> Inputs:
    """Random latents in shuffled blocks."""
    rank_k, rank_v = point.ranks
    queries = 1 if point.phase == "decode" else point.context
    blocks = point.batch * point.context // BLOCK_SIZE
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    reconstruction, query_size = None, rank_k
    if point.key_mode.reconstructs_keys:
        query_size = point.head_size
        frequencies = 10000.0 ** -torch.linspace(0, 1, query_size // 2 + 1)[:-1]
        rotary = RotaryTable.from_frequencies(frequencies, point.context)
        rotary = replace(rotary, cos_sin=rotary.cos_sin.to(device))
        basis = torch.randn(point.kv_heads, rank_k, query_size, **options) / rank_k**0.5
        reconstruction = KeyReconstruction(basis, rotary)
    tokens = point.batch * queries
    return Inputs(
        layer=LayerSpec(
            num_heads=point.heads,
            num_kv_heads=point.kv_heads,
            rank_k=rank_k,
            rank_v=rank_v,
            dtype=torch.bfloat16,
            cache_dtype=torch.bfloat16,
            scores=ScoreOptions(point.head_size**-0.5),
            reconstruction=reconstruction,
        ),
        step=Step(
            torch.arange(point.batch + 1, dtype=torch.int32, device=device) * queries,
            torch.full((point.batch,), point.context, dtype=torch.int32, device=device),
            torch.randperm(blocks, device=device).int().view(point.batch, -1),
            num_actual_tokens=tokens,
            max_query_len=queries,
        ),
        query=torch.randn(tokens, point.heads, query_size, **options),
        cache=torch.randn(blocks, point.kv_heads, BLOCK_SIZE, rank_k + rank_v, **options),
        output=torch.full((tokens, point.heads, rank_v), float("nan"), **options),
    )


def relative_error(point: GpuPoint, inputs: Inputs) -> float:
    """Of the first and last rows of the last sequence, all heads, against float64."""
    rank_k, _ = point.ranks
    last = point.batch - 1
    tokens = inputs.cache[inputs.step.block_table[last].long()].double()
    latents = tokens.transpose(0, 1).flatten(1, 2)
    start, end = (int(inputs.step.query_start_loc[i]) for i in (last, last + 1))
    found, wanted = [], []
    for row in {start, end - 1}:
        seen = point.context - (end - 1 - row)
        for head in range(point.heads):
            kv_head = head // (point.heads // point.kv_heads)
            keys, values = latents[kv_head, :seen, :rank_k], latents[kv_head, :seen, rank_k:]
            if (reconstruction := inputs.layer.reconstruction) is not None:
                keys = keys @ reconstruction.key_basis[kv_head].double()
                x, y = keys.chunk(2, dim=-1)
                cos, sin = reconstruction.rotary.cos_sin[:seen].double().chunk(2, dim=-1)
                keys = torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)
            logits = keys @ inputs.query[row, head].double() * inputs.layer.scores.scale
            wanted.append(torch.softmax(logits, 0) @ values)
            found.append(inputs.output[row, head].double())
    difference = torch.stack(found) - torch.stack(wanted)
    return float(difference.norm() / torch.stack(wanted).norm())


def vllm_call(point: GpuPoint, device: str) -> Callable[[], object] | None:
    """vLLM's Triton unified attention at full rank, with its split-KV buffers; None without it."""
    try:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except ImportError:
        return None
    full = make(replace(point, kv_ratio=1.0, key_mode=KeyMode.NO_ROPE), device)
    size, segments, threshold = point.head_size, 16, 128 // point.kv_heads
    rows = (max(threshold, 1), point.heads, segments)
    workspace = [torch.empty(s, device=device) for s in ((*rows, size), rows, rows)]
    # vLLM's own layout: keys and values apart, [blocks, block_size, kv_heads, head_size].
    keys, values = full.cache.view(2, -1, BLOCK_SIZE, point.kv_heads, size)
    options: dict[str, Any] = dict.fromkeys(("q_descale", "k_descale", "v_descale"))
    options |= {"q": full.query, "k": keys, "v": values, "out": full.output, "causal": True}
    options |= {"cu_seqlens_q": full.step.query_start_loc, "seqused_k": full.step.seq_lens}
    options |= {"max_seqlen_q": full.query.shape[0] // point.batch, "max_seqlen_k": point.context}
    options |= {"softmax_scale": full.layer.scores.scale, "window_size": (-1, -1), "softcap": 0}
    options |= {"softmax_segm_output": workspace[0], "softmax_segm_max": workspace[1]}
    options |= {"softmax_segm_expsum": workspace[2], "num_par_softmax_segments": segments}
    options |= {"block_table": full.step.block_table, "seq_threshold_3D": threshold}
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
    tiles = [Tile(16, *shape, swap_ab=True) for shape in swapped]
    tiles += [Tile(16, *shape, swap_ab=False) for shape in [(64, 1, 3), (32, 1, 5), (64, 4, 3)]]
    return [Tuning(t, t, relative_rotation=r) for t, r in product(tiles, (True, False))]


def measure(point: GpuPoint, tuning: Tuning, device: str, repeats: int) -> dict[str, Any]:
    """One row: checked, then timed beside the baseline."""
    inputs = make(point, device)
    kernels = GpuKernels(tuning)
    plan = kernels.plan(inputs.step, inputs.layer.plan_geometry(BLOCK_SIZE))
    attend = kernels.prepare(inputs.layer).attend
    ours = partial(attend, inputs.query, inputs.cache, inputs.output, plan)
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
