# SPDX-License-Identifier: Apache-2.0
"""One point checked against float64, replayed as a CUDA graph, and timed beside its baselines."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from vllm_eigen.benchmarks.kernels.gpu.baselines import BASELINES, FullInputs
from vllm_eigen.benchmarks.kernels.gpu.points import (
    BLOCK_SIZE,
    GpuPoint,
    Inputs,
    cached_bytes,
    make,
)
from vllm_eigen.kernels.coding import from_bytes, to_bytes
from vllm_eigen.kernels.gpu.kernels import GpuKernels
from vllm_eigen.kernels.gpu.tiles import Tile, Tuning

TOLERANCE = 2e-2
"""Relative error of bfloat16 products, probabilities and outputs; fp8 latents are compared as
stored."""
Call = Callable[[], object]
Row = dict[str, Any]


def prepare(point: GpuPoint, tuning: Tuning, device: str) -> tuple[Inputs, Call]:
    """Inputs whose cache is written, and the attention over it."""
    inputs = make(point, device)
    kernels = GpuKernels(tuning)
    layer = kernels.prepare(inputs.layer)
    layer.write_cache(inputs.key, inputs.value, inputs.cache, inputs.slots)
    plan = kernels.plan(inputs.step, inputs.layer.plan_geometry(BLOCK_SIZE))
    return inputs, lambda: layer.attend(inputs.query, inputs.cache, inputs.output, plan)


def check(point: GpuPoint, device: str) -> Row:
    """The point's relative error, and whether a captured graph gives the same bits."""
    inputs, attend = prepare(point, Tuning(), device)
    attend()
    error = relative_error(point, inputs)
    row = named(point) | {"relative_error": error, "agrees": error < TOLERANCE}
    if point.phase == "decode":
        row["replays"] = replays(inputs, attend)
    return row


def replays(inputs: Inputs, attend: Call) -> bool:
    """Whether a graph captured at full lengths, replayed at others, gives what a call gives."""
    replay = graphed(attend)
    lengths = inputs.step.seq_lens
    lengths.copy_(torch.clamp(lengths - 37 * torch.arange(1, 1 + len(lengths)).to(lengths), min=1))
    inputs.output.fill_(float("nan"))
    replay()
    found = inputs.output.clone()
    inputs.output.fill_(float("nan"))
    attend()
    return bool(torch.equal(found, inputs.output))


def relative_error(point: GpuPoint, inputs: Inputs) -> float:
    """Of the first and last rows of the last sequence, all heads, against float64."""
    layer, last = inputs.layer, point.batch - 1
    tokens = slice(last * point.context, (last + 1) * point.context)
    codes = layer.key_code, layer.value_code
    key, value = (
        _stored(rows[tokens], layer.cache_dtype, code)
        for rows, code in zip((inputs.key, inputs.value), codes, strict=True)
    )
    start, end = last * point.queries, (last + 1) * point.queries
    found, wanted = [], []
    for row in {start, end - 1}:
        seen = point.context - (end - 1 - row)
        for head in range(point.heads):
            kv_head = head // (point.heads // point.kv_heads)
            keys, values = key[:seen, kv_head], value[:seen, kv_head]
            if (reconstruction := layer.reconstruction) is not None:
                keys = keys @ reconstruction.key_basis[kv_head].double()
                x, y = keys.chunk(2, dim=-1)
                cos, sin = reconstruction.rotary.cos_sin[:seen].double().chunk(2, dim=-1)
                keys = torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)
            logits = keys @ inputs.query[row, head].double() * layer.scores.scale
            wanted.append(torch.softmax(logits, 0) @ values)
            found.append(inputs.output[row, head].double())
    difference = torch.stack(found) - torch.stack(wanted)
    return float(difference.norm() / torch.stack(wanted).norm())


def _stored(rows: torch.Tensor, cache_dtype: torch.dtype, code: Any) -> torch.Tensor:
    """Latents as the cache keeps them, in float64."""
    if code is not None:
        return from_bytes(to_bytes(rows, code), code).double()
    return rows.to(cache_dtype).double()


def graphed(call: Call) -> Call:
    """The call as a CUDA graph replay, once warm; without a GPU, the call."""
    if not torch.cuda.is_available():
        return call
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def milliseconds(calls: Mapping[str, Call], repeats: int) -> dict[str, float]:
    """Medians of the calls, run in turn; on a GPU by events around each."""
    event: Any = torch.cuda.Event

    def once(call: Call) -> float:
        if not torch.cuda.is_available():
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        start, end = (event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    rounds = [[once(call) for call in calls.values()] for _ in range(repeats)]
    medians = [float(statistics.median(taken)) for taken in zip(*rounds, strict=True)]
    return dict(zip(calls, medians, strict=True))


def copy_gbs(device: str, numbers: int = 2**29) -> float:
    """Device-to-device copy, bytes read plus bytes written."""
    source, target = torch.zeros(2, numbers, device=device)
    taken = milliseconds({"copy": graphed(lambda: target.copy_(source))}, 20)
    return float(2 * source.nbytes / taken["copy"] / 1e6)


def tunings(sweep: bool) -> list[Tuning]:
    """The default, or the decode tiles worth trying."""
    if not sweep:
        return [Tuning()]
    swapped = [(64, 4, 3), (64, 4, 5), (128, 4, 3), (128, 8, 3)]
    tiles = [Tile(16, *shape, swap_ab=True) for shape in swapped]
    tiles += [Tile(16, *shape, swap_ab=False) for shape in [(64, 1, 3), (32, 1, 5), (64, 4, 3)]]
    return [
        Tuning(tile, tile, tile, tile, relative_rotation=relative)
        for tile in tiles
        for relative in (True, False)
    ]


def measure(point: GpuPoint, tuning: Tuning, device: str, repeats: int) -> Row:
    """One row: milliseconds of ours and of every baseline that there is.

    `missing` says why a baseline is not there.
    """
    inputs, attend = prepare(point, tuning, device)
    attend()
    row = named(point) | {"tuning": asdict(tuning), "relative_error": relative_error(point, inputs)}
    calls, missing = {"eigen": graphed(attend)}, {}
    full = FullInputs.of(point, device)
    for name, make_call in BASELINES.items():
        try:
            call = make_call(full)
            call()
            calls[name] = graphed(call)
        except Exception as error:  # Of another project: whatever it is, it is written down.
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    taken = milliseconds(calls, repeats)
    read = cached_bytes(point) + inputs.query.nbytes + inputs.output.nbytes
    return row | {
        "milliseconds": taken,
        "missing": missing,
        "bytes": read,
        "gbs": read / taken["eigen"] / 1e6,
    }


def named(point: GpuPoint) -> Row:
    """The point's columns."""
    row: Row = asdict(point) | {"key_mode": str(point.key_mode), "ranks": list(point.ranks)}
    return row


def needed_bytes(point: GpuPoint) -> int:
    """Device memory that the point and its baselines take, from above."""
    full = replace(point, bits=16, kv_ratio=1.0)
    # Latents before they are written, ours, and a contiguous and a paged cache of the baselines.
    return 2 * cached_bytes(replace(full, head_size=max(point.ranks))) + 3 * cached_bytes(full)
